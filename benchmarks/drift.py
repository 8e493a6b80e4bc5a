"""The drift alarm on the flights of 2013: what a report costs against Evidently, how often it cries wolf, and what it
finds.

The reference is January to May, as in the bundle. False alarms of days and weeks are counted out of sample: the null
is learnt from four fifths of the weeks and judged on the others, which are dealt anew for each seed, from 8 January
on (in the first week the rates of three weeks are not known yet). Months are four weeks drawn from the reference and
held against it; beside them stand those of unseen weeks. Faults are put into days of June to December, one column at
a time; a fault counts as found when its column is the first of the alarms of that one day. For weather, which differs
from day to day, the days that it takes are counted from midnight (UTC) of ten days, with the day before for the hours
to go on from. Evidently reads the raw frames in an environment of its own, where `make bench-peers` has installed it.
"""

import needs

needs.packages()

import json
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from report import arguments, faster, finish, median_seconds, row

from mlnb.data.hourly_profiles import HourlyProfile, HourlyStats
from mlnb.data.profiles import Profile
from mlnb.flights.features import CATEGORICAL, NUMERIC, REQUEST
from mlnb.flights.train import between, inputs
from mlnb.models.metrics import Cost
from mlnb.models.tabular import TabularPredictor
from mlnb.monitoring.alarms import WindowResiduals, assess_drift, assess_window
from mlnb.monitoring.cross_column import Residuals, effects
from mlnb.monitoring.drift import compare, is_timestamp
from mlnb.monitoring.drift_sources import hourly_from_table, split_windows
from mlnb.monitoring.drift_thresholds import DriftThresholds, calibrate, thresholds_from_days

ROOT = Path(__file__).parents[1]
FLIGHTS = ROOT / "products" / "flights"
COLUMNS = list(
    dict.fromkeys(
        [*(n for n in REQUEST if n != "flight"), *CATEGORICAL, *NUMERIC, "decision_time", "probability", "decision"]
    )
)
NAMES = {"request": REQUEST, "label_rates": ("*_disrupted_*",)}
WEATHER = ("temperature", "humidity", "wind_speed", "pressure", "visibility")
FOLDS, SEEDS = 5, 4
AS_NUMBER = "minute_of_day"
OUTPUTS = ("score", "decision", "label rate")
TIME = "decision_time"
STARTS = range(1, 182, 20)  # days of June to December on which the weather's faults begin


def scored() -> pd.DataFrame:
    """Every flight with its features, its score and its decision, as the service would log it."""
    table = between(pd.read_parquet(FLIGHTS / "features.parquet"), "2013-01-01", "2014-01-01")
    table["probability"] = TabularPredictor.load(FLIGHTS / "model").predict(inputs(table))
    table["decision"] = Cost().decide(table["probability"].to_numpy())
    return table


def share(part: float) -> str:
    return f"{part:.1%}"


# --- what a report costs ----------------------------------------------------------------------------------------------


def evidently(before: pd.DataFrame, now: pd.DataFrame, times: int) -> float:
    """CPU seconds of Evidently's report."""
    python = needs.peer("evidently")
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{name}.csv" for name in ("reference", "current")]
        for file, frame in zip(files, (before, now), strict=True):
            frame.to_csv(file, index=False)
        program = Path(__file__).parent / "peers" / "evidently_report.py"
        done = subprocess.run(
            [str(python), str(program), *files, str(times)], stdout=subprocess.PIPE, text=True, check=True, timeout=600
        )
    return json.loads(done.stdout)


def cost(table: pd.DataFrame, thresholds: DriftThresholds, times: int) -> list[dict]:
    """A report of July against January to May, 30 features."""
    names = [*CATEGORICAL, *NUMERIC][:30]
    before, now = (table.loc[table.month.isin(months), names] for months in (range(1, 6), [7]))
    profiles = [Profile.of(frame).to_bytes() for frame in (before, now)]
    hours = hourly_from_table(table[table.month.isin([6, 7])], TIME)

    def report():
        reference, current = map(Profile.from_bytes, profiles)
        assess_drift(compare(reference, {"2013-07": current}, window_size="month"), thresholds, "month", hourly=hours)

    ours, peer = median_seconds(report, 2 * times + 1), evidently(before, now, times)
    rows = [row("drift report of two profiles, 30 features, CPU s", ours, "<= 0.5", ours <= 0.5)]
    with_profile = median_seconds(lambda: (Profile.of(now), report()), times)
    size = f"{len(before):,} and {len(now):,} rows"
    name = f"drift report, 30 features, CPU s, against Evidently on the raw frames ({size})"
    return [
        *rows,
        faster(name, ours, peer, 10),
        faster("the same, the profile of July made first", with_profile, peer, 10),
    ]


# --- how often it cries wolf ------------------------------------------------------------------------------------------


def false_alarm_rates(known: pd.DataFrame, thresholds: DriftThresholds, draws: int) -> list[dict]:
    """The share of reports with an alarm where nothing is wrong, over several seeds."""
    days, hourly = split_windows(known, "day", TIME), hourly_from_table(known, TIME)
    labels = sorted(days)[7:-1]
    weeks = [labels[at : at + 7] for at in range(0, len(labels) - 6, 7)]
    unseen = [unseen_blocks(days, hourly, weeks, draws, seed) for seed in range(SEEDS)]  # of each: days, weeks, months
    seeds = [np.mean([*one_day, *week]) for one_day, week, _ in unseen]
    of_days, of_weeks, of_months = (np.concatenate([found[kind] for found in unseen]) for kind in range(3))
    blocks = np.concatenate([of_days, of_weeks])
    reference = Profile.merged(days.values())
    drawn = [drawn_months(days, hourly, weeks, reference, thresholds, draws, seed) for seed in range(SEEDS)]
    summary = f"1 day {share(of_days.mean())}, 7 days {share(of_weeks.mean())}; seeds {', '.join(map(share, seeds))}"
    months = ", ".join(share(np.mean(found)) for found in drawn)
    name = f"false alarms, {len(blocks)} blocks of days of weeks the null has not seen"
    name += f", mean of {SEEDS} seeds ({summary}), share of reports"
    rows = [row(name, float(blocks.mean()), "<= 0.05", blocks.mean() <= 0.05)]
    name = f"false alarms, {np.size(drawn)} months of four weeks of the reference"
    name += f", mean of {SEEDS} seeds ({months}), share of reports"
    rows.append(row(name, float(np.mean(drawn)), "<= 0.05", np.mean(drawn) <= 0.05))
    name = f"false alarms, {len(of_months)} months of four weeks the null has not seen, share of reports"
    return [*rows, row(name, float(of_months.mean()), "", True)]


def unseen_blocks(
    days: dict[str, Profile], hourly: HourlyProfile, weeks: list[list[str]], draws: int, seed: int
) -> tuple[list, list, list]:
    """Whether reports of days, weeks and months have alarms, by nulls that have seen none of their days."""
    rng = np.random.default_rng(seed)
    order, found = rng.permutation(len(weeks)), ([], [], [])
    for part in range(FOLDS):
        held = [weeks[at] for at in order[part::FOLDS]]
        unseen = [day for week in held for day in week]
        learnt = {day: days[day] for day in days if day not in unseen}
        thresholds = thresholds_from_days(learnt, hourly=without(hourly, unseen), **NAMES)
        reference, residuals = Profile.merged(learnt.values()), thresholds.consistency.residuals(hourly)
        judged = lambda window, of=(reference, thresholds, residuals): alarmed(days, window, *of)
        found[0].extend(judged([day]) for day in rng.choice(unseen, draws // FOLDS, replace=False))
        found[1].extend(map(judged, held))
        found[2].append(judged(unseen))
    return found


def without(hourly: HourlyProfile, days: list[str]) -> HourlyProfile:
    """The hours of all other days."""
    remaining = ~np.isin(day_of(hourly.hours), days)
    columns = {
        name: HourlyStats(*(values[remaining] for values in vars(figures).values()))
        for name, figures in hourly.columns.items()
    }
    return HourlyProfile(hourly.hours[remaining], hourly.rows[remaining], columns)


def day_of(hours: np.ndarray) -> np.ndarray:
    """The day of each hour."""
    return np.datetime_as_string(hours.astype("datetime64[D]"))


def drawn_months(
    days: dict,
    hourly: HourlyProfile,
    weeks: list[list[str]],
    reference: Profile,
    thresholds: DriftThresholds,
    draws: int,
    seed: int,
) -> list[bool]:
    """Whether reports of months of four weeks, drawn with replacement from the reference, have alarms."""
    chosen, residuals = (
        np.random.default_rng(seed).integers(len(weeks), size=(draws, 4)),
        thresholds.consistency.residuals(hourly),
    )
    return [
        alarmed(days, [day for at in four for day in weeks[at]], reference, thresholds, residuals) for four in chosen
    ]


def alarmed(
    days: dict[str, Profile], window: list[str], reference: Profile, thresholds: DriftThresholds, residuals: Residuals
) -> bool:
    """Whether a report of these days has an alarm."""
    merged = Profile.merged([days[day] for day in window]).columns
    timeless = Profile(
        {name: column for name, column in merged.items() if not is_timestamp(column)}
    )  # drawn days span what they like
    return bool(
        assess_window(
            reference, timeless, thresholds, "day" if len(window) == 1 else None, hours=of_days(residuals, window)
        ).alarms
    )


def of_days(residuals: Residuals, window: list[str]) -> dict[str, dict[str, float]]:
    """What the hours of some days say."""
    of_day = {day: np.flatnonzero(day_of(residuals.hours) == day) for day in set(window)}
    found = effects(residuals, [np.concatenate([of_day[day] for day in window])])
    return {name: {statistic: values[0] for statistic, values in of.items()} for name, of in found.items()}


# --- what it finds ----------------------------------------------------------------------------------------------------


def months(table: pd.DataFrame, reference: Profile, thresholds: DriftThresholds) -> list[dict]:
    """July, September and December alarm by score or label rates, August by none of them."""
    summary, holds = [], True
    hours = WindowResiduals(thresholds, hourly_from_table(table[COLUMNS], TIME))
    for month, name in {7: "July", 8: "August", 9: "September", 12: "December"}.items():
        now = Profile.of(table.loc[table.month == month, COLUMNS])
        alarms = assess_window(reference, now, thresholds, "month", hours=hours.effects(f"2013-{month:02}")).alarms
        family_excess = {
            alarm.family: alarm.times_threshold for alarm in reversed(alarms) if alarm.family in OUTPUTS
        }  # the most unusual of each family
        alarmed = " and ".join(f"{family} {over:.2f}x" for family, over in sorted(family_excess.items()))
        summary.append(f"{name} {alarmed or 'none'}")
        holds &= bool(family_excess) == (month != 8)
    name = f"alarms of score, decision or label rates, and how many times the threshold: {', '.join(summary)}"
    return [row(name, "as it must be" if holds else "wrong", "all but August", holds)]


def faults(spread: dict[str, float], seed: int = 0) -> dict[str, tuple[str, object]]:
    """Name -> column and what happens to the rows of a day."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in ("distance", AS_NUMBER):
        found[f"{name} shifted by 0.5 sd"] = name, lambda f, n=name: f.assign(**{n: f[n] + 0.5 * spread[n]})
        found[f"{name} x1.6"] = name, lambda f, n=name: f.assign(**{n: f[n] * 1.6})
    hours = [f"{hour:02}" for hour in range(24)]
    found["hour shifted by 2"] = (
        "hour",
        lambda f: f.assign(hour=f["hour"].map(lambda hour: hours[(int(hour) + 2) % 24])),
    )
    for name, old, new in (
        ("carrier", "UA", "ua"),
        ("carrier", "WN", "SWA"),
        ("origin", "JFK", "KJFK"),
        ("hour", "08", "8"),
    ):
        found[f"{name} {old} renamed"] = name, lambda f, n=name, a=old, b=new: f.assign(**{n: f[n].replace({a: b})})
    for name in ("distance", AS_NUMBER, "hour", "carrier", "origin"):
        found[f"{name} 5% missing"] = name, lambda f, n=name: f.assign(**{n: f[n].mask(rng.random(len(f)) < 0.05)})
        found[f"{name} stuck"] = name, lambda f, n=name: f.assign(**{n: f[n].iloc[0]})
    return found | {"origin LGA lost": ("origin", lambda f: f[f["origin"] != "LGA"])}


def steady(table: pd.DataFrame, reference: Profile, thresholds: DriftThresholds, every: int) -> list[dict]:
    """Every fault in several days; found and named first by that day alone."""
    spread = table.loc[table.month <= 5, ["distance", "minute_of_day"]].std().to_dict()
    days = days_of_table(table[table.month >= 6])
    labels = list(days)[1::every]
    before = {label: hourly_from_table(table[before_of(table, label)], TIME) for label in labels}
    hours = lambda label, rows: WindowResiduals(
        thresholds, HourlyProfile.merged([before[label], hourly_from_table(rows, TIME)])
    ).effects(label)
    sound = {label: Profile.of(days[label][COLUMNS]) for label in labels}
    missed, named, caught = {}, {"": [], AS_NUMBER: []}, []
    for name, (column, change) in faults(spread).items():
        for label, whole in sound.items():
            changed = change(days[label])
            found = assess_window(
                reference, with_fault(whole, changed, column), thresholds, "day", hours=hours(label, changed)
            )
            alarms = [alarm.column for alarm in found.alarms]
            named[AS_NUMBER if column == AS_NUMBER else ""].append(alarms[:1] == [column])
            caught += [column in alarms] if column != AS_NUMBER else []
            if alarms[:1] != [column]:
                missed[name] = missed.get(name, 0) + 1
    judged = [
        assess_window(reference, whole, thresholds, "day", hours=hours(label, days[label]))
        for label, whole in sound.items()
    ]
    loud = [[alarm.column for alarm in found.alarms] for found in judged]
    causes = ", ".join(f"{name} {n}" for name, n in Counter(name for alarms in loud for name in alarms).most_common(3))
    summary = f"; not: {', '.join(f'{name} {n}' for name, n in missed.items())}" if missed else ""
    many = sum(column != AS_NUMBER for column, _ in faults(spread).values())
    prefix, first = f"{many} faults in distance, hour, carrier and origin on {len(labels)} days", np.mean(named[""])
    return [
        row(f"{prefix}: caught within that day, share", float(np.mean(caught)), "1", all(caught)),
        row(f"{prefix}: and named first, share{summary}", float(first), "1", first == 1),
        row(
            "the scheduled hour as a number (minute_of_day): named first, share",
            float(np.mean(named[AS_NUMBER])),
            "",
            True,
        ),
        row(
            f"the same {len(labels)} days without a fault: no alarm, share; alarms: {causes}",
            np.mean([not a for a in loud]),
            "",
            True,
        ),
    ]


def before_of(table: pd.DataFrame, label: str) -> pd.Series:
    """Which rows are of the day before."""
    day = pd.Timestamp(label, tz=table[TIME].dt.tz)
    return table[TIME].between(day - pd.Timedelta(days=1), day, inclusive="left")


def with_fault(whole: Profile, changed: pd.DataFrame, column: str) -> Profile:
    """The profile of a day with a fault; the other columns are profiled again only where rows are gone."""
    if len(changed) != whole.rows:
        return Profile.of(changed[COLUMNS])
    return Profile(whole.columns | Profile.of(changed[[column]]).columns)


def days_of_table(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each day of UTC with a full timetable."""
    days = {str(day): rows for day, rows in table.groupby(table[TIME].dt.strftime("%Y-%m-%d"))}
    return {day: rows for day, rows in days.items() if len(rows) > 500}


def weather(table: pd.DataFrame, reference: Profile, thresholds: DriftThresholds) -> list[dict]:
    """Days of faulty weather until its column alarms, where it does not without the fault; the median of several
    starts."""
    days, spread = days_of_table(table[table.month >= 6]), table.loc[table.month <= 5, list(WEATHER)].std()
    rng, labels, rows = np.random.default_rng(1), list(days), []
    changes = {
        "shifted by 0.5 sd": lambda v, name: v + 0.5 * spread[name],
        "x1.6": lambda v, name: v * 1.6,
        "5% missing": lambda v, name: v.mask(rng.random(len(v)) < 0.05),
        "stuck": lambda v, name: v.where(v.isna(), v.dropna().iloc[0]),
    }
    for word, change in changes.items():
        taken = {
            name: [until_caught(days, labels[at - 1 : at + 30], name, change, reference, thresholds) for at in STARTS]
            for name in WEATHER
        }
        known = {name: [days for days in found if days] for name, found in taken.items()}
        summary = [
            f"{name} {statistics.median_high(d)} days ({len(d)} of {len(STARTS)})" if d else f"{name} never"
            for name, d in known.items()
        ]
        holds = all(len(found) > len(STARTS) / 2 for found in known.values())
        rows.append(row(f"weather {word}: days until caught: {', '.join(summary)}", None, "caught, reported", holds))
    return rows


def until_caught(
    days: dict, labels: list[str], name: str, change, reference: Profile, thresholds: DriftThresholds
) -> int | None:
    """1, 7 or 30: the first length of window whose column alarms with the fault and not without; the fault begins on
    the second day."""
    whole = pd.concat([days[label].assign(day=i) for i, label in enumerate(labels)])
    faulty = whole.assign(**{name: whole[name].where(whole["day"] == 0, change(whole[name], name))})
    residuals_of_sides = [
        thresholds.consistency.residuals(hourly_from_table(side[COLUMNS], TIME)) for side in (faulty, whole)
    ]
    for length in (1, 7, 30):
        alarms = []
        for side, residuals in zip((faulty, whole), residuals_of_sides, strict=True):
            now = Profile.of(side.loc[side["day"].between(1, length), [TIME, name]])
            hours = of_days(residuals, labels[1 : length + 1])
            alarms.append(
                bool(assess_window(reference, now, thresholds, "day" if length == 1 else "month", [name], hours).alarms)
            )
        if alarms == [True, False]:
            return length
    return None


def main():
    """Measure, print, and exit with 1 if a bar does not hold."""
    options = arguments(__doc__)
    options.add_argument("--times", type=int, default=1, help="runs of the peer, of which the median counts")
    options.add_argument("--draws", type=int, default=50, help="days, and months, that are judged for each seed")
    options.add_argument("--every", type=int, default=11, help="every such day of June to December gets the faults")
    chosen = options.parse_args()
    needs.products()
    needs.peer("evidently")
    finish(measure(chosen.times, chosen.draws, chosen.every), chosen.json)


def measure(times: int, draws: int, every: int) -> list[dict]:
    """Every row of the table."""
    table = scored()
    known = table.loc[table.month <= 5, COLUMNS]
    start = time.process_time()
    thresholds = calibrate(known, TIME, **NAMES)
    taken = time.process_time() - start
    reference = Profile.of(known)
    rows = cost(table, thresholds, times)
    rows.append(row(f"drift null of {len(known):,} rows, {thresholds.days} days, CPU s", taken, "", True))
    rows += false_alarm_rates(known, thresholds, draws)
    rows += months(table, reference, thresholds)
    rows += steady(table, reference, thresholds, every)
    return rows + weather(table, reference, thresholds)


if __name__ == "__main__":
    main()
