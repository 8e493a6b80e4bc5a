"""Drift thresholds: what is ordinary, what is an alarm, and what cannot be assessed."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import warm_cli

from mlnb.data.profiles import Profile
from mlnb.monitoring.alarms import WindowResiduals, assess_drift, assess_window, describe_alarms
from mlnb.monitoring.cross_column import CrossColumnModel
from mlnb.monitoring.drift import compare
from mlnb.monitoring.drift_sources import RowFilter, hourly_from_table
from mlnb.monitoring.drift_thresholds import STATISTIC_NAMES, DriftThresholds, calibrate, thresholds_from_days
from mlnb.project.errors import ProfileError

DAYS, ROWS = 126, 240


def table(days=DAYS, seed=0, start="2013-01-01"):
    "Days that share their weather; distances and carriers that do not care; a score that follows the wind"
    rng = np.random.default_rng(seed)
    wind = np.repeat(rng.gamma(2, 5, days), ROWS) + rng.normal(0, 1, days * ROWS)
    probability = 1 / (1 + np.exp(2 - wind / 10))
    return pd.DataFrame(
        {
            "decision_time": pd.date_range(start, periods=days * ROWS, freq="6min"),
            "wind": wind,
            "distance": rng.gamma(3, 300, days * ROWS),
            "carrier": rng.choice(["UA", "DL", "B6", "WN"], days * ROWS, p=[0.4, 0.3, 0.2, 0.1]),
            "disrupted_7d": np.repeat(rng.beta(5, 15, days), ROWS),
            "probability": probability,
            "decision": probability >= 1 / 3,
        }
    )


@pytest.fixture(scope="module")
def known():
    return table()


@pytest.fixture(scope="module")
def thresholds(known):
    return calibrate(known, request=("distance", "carrier"), label_rates=("disrupted_*",))


@pytest.fixture(scope="module")
def reference(known):
    return Profile.of(known)


def alarms(reference, thresholds, frame, window_size="day"):
    return assess_window(reference, Profile.of(frame), thresholds, window_size).alarms


def a_day(seed):
    return table(1, seed, "2013-07-01")


def test_families_and_lengths(thresholds):
    assert thresholds.families == {
        "wind": "feature",
        "distance": "input",
        "carrier": "input",
        "disrupted_7d": "label rate",
        "probability": "score",
        "decision": "output",
    }
    assert {point.days for point in thresholds.ordinary} == {1, 7, 30} and thresholds.days == DAYS - 2


def weather(days, seed, start="2013-01-01"):
    "Ten rows an hour of one weather: the air follows from the others, the pressure goes on from hour to hour"
    rng, hours = np.random.default_rng(seed), days * 24
    slow = lambda: np.convolve(
        rng.normal(size=hours + 71), np.hanning(72) / np.sqrt((np.hanning(72) ** 2).sum()), "valid"
    )
    dew, humidity, pressure = slow(), slow(), slow()
    air = dew - 0.5 * humidity + 0.1 * humidity**2 + rng.normal(0, 0.02, hours)
    found = {
        "air": 50 + 15 * air,
        "dew": dew,
        "humidity": humidity,
        "pressure": 1015 + 7 * pressure,
        "load": rng.poisson(40, hours),
    }
    table = pd.DataFrame({name: np.repeat(values, 10) for name, values in found.items()})
    return table.assign(
        time=pd.date_range(start, periods=hours * 10, freq="6min"), carrier=rng.choice(["UA", "DL"], hours * 10)
    )


@pytest.fixture(scope="module")
def knows_weather():
    rows = weather(140, 0)
    return Profile.of(rows), calibrate(rows)


WEATHER = {
    "a sensor that is off": (
        "air",
        "together",
        lambda f: f.assign(air=f["air"].where(f.time < "2013-07-02", f["air"] + 7)),
    ),
    "a jump": ("pressure", "jump", lambda f: f.assign(pressure=f["pressure"] + 3.5 * (f.time >= "2013-07-02T09"))),
    "lost at random": (
        "dew",
        "missing",
        lambda f: f.assign(dew=f["dew"].mask(np.random.default_rng(0).random(len(f)) < 0.1)),
    ),
}


@pytest.mark.parametrize("name", WEATHER)
@pytest.mark.parametrize("seed", range(3))
def test_hours_find_what_a_month_of_another_season_hides(name, seed, knows_weather):
    reference, thresholds = knows_weather
    column, statistic, change = WEATHER[name]
    later = weather(3, 100 + seed, "2013-07-01")
    day = lambda frame: {"2013-07-02": Profile.of(frame[frame.time.dt.day == 2])}
    judged = lambda frame, **hours: (
        assess_drift(compare(reference, day(frame), window_size="day"), thresholds, "day", **hours)
        .windows[0]
        .assessment.alarms
    )
    assert judged(later, hourly=hourly_from_table(later)) == []
    found = {alarm.column: alarm for alarm in judged(change(later), hourly=hourly_from_table(change(later)))}
    assert statistic in (found[column].statistic, *found[column].other_statistics)
    if statistic != "missing":
        assert column not in {alarm.column for alarm in judged(change(later))}
        hourly_series = found[column].hourly_series
        assert (
            hourly_series.hours[0] == "2013-07-02T00"
            and len(hourly_series.hours) == len(hourly_series.mean) == len(hourly_series.expected) == 24
        )
        assert max(abs(a - b) for a, b in zip(hourly_series.mean, hourly_series.expected, strict=True)) > 2


def test_of_two_that_do_not_fit_the_one_that_moved_is_named(knows_weather):
    reference, thresholds = knows_weather
    later = weather(3, 7, "2013-07-01").assign(dew=lambda f: f["dew"] + 30)
    hours = WindowResiduals(thresholds, hourly_from_table(later)).effects("2013-07-02")
    assert min(hours[name]["together"] for name in ("air", "dew")) > 1
    found = assess_window(reference, Profile.of(later[later.time.dt.day == 2]), thresholds, "day", hours=hours).alarms
    assert [alarm.column for alarm in found] == ["dew"]


@pytest.mark.parametrize("around", [0, 1, 60], ids="{} days loaded around".format)
def test_few_ordinary_days_of_weather_have_an_alarm_whatever_is_loaded(around, knows_weather):
    reference, thresholds = knows_weather
    later, loud = weather(60, 5, "2013-06-01"), 0
    for day, frame in later.groupby(later.time.dt.strftime("%Y-%m-%d")):
        near = (later.time - pd.Timestamp(day)).dt.days.between(-around, around)
        hours = WindowResiduals(thresholds, hourly_from_table(later[near])).effects(day)
        loud += bool(assess_window(reference, Profile.of(frame), thresholds, "day", hours=hours).alarms)
    assert loud <= 4  # of 60


def test_hours_of_fewer_rows_need_a_larger_effect_and_of_too_few_have_none(knows_weather):
    reference, thresholds = knows_weather
    later, found = WEATHER["a sensor that is off"][2](weather(3, 100, "2013-07-01")), {}
    for every in (1, 2, 9):
        some = later[::every]
        hours = WindowResiduals(thresholds, hourly_from_table(some)).effects("2013-07-02")
        alarms = assess_window(
            reference, Profile.of(some[some.time.dt.day == 2]), thresholds, "day", hours=hours
        ).alarms
        found[every] = next((alarm for alarm in alarms if alarm.column == "air"), None)
    assert (
        found[1].effect == pytest.approx(found[2].effect, rel=0.05)
        and found[1].threshold < found[2].threshold
        and found[9] is None
    )


@pytest.mark.parametrize("far", ["1970-01-01", "9999-12-31"])
def test_a_time_that_is_far_away_costs_nothing(far, knows_weather):
    rows = weather(3, 1)
    hours = hourly_from_table(pd.concat([rows, rows.iloc[:1].assign(time=pd.Timestamp(far))]))
    assert len(knows_weather[1].consistency.residuals(hours).hours) == 3 * 24 + 1


def test_a_course_has_the_digits_that_its_column_needs():
    rows = weather(60, 0)
    fine = rows.assign(air=1e6 + rows["air"] / 200, dew=rows["dew"] * 1e-8)
    thresholds, hours = calibrate(fine), fine["time"].dt.strftime("%Y-%m-%dT%H")
    for name in ("air", "dew"):
        hourly_series = WindowResiduals(thresholds, hourly_from_table(fine)).hourly_series("2013-01-09", name)
        true = fine[name].groupby(hours).mean()[hourly_series.hours]
        assert np.allclose(hourly_series.mean, true, rtol=0, atol=1e-3 * fine[name].std())


def test_a_null_of_an_earlier_release_knows_no_hours(knows_weather):
    thresholds = knows_weather[1]
    stated = json.loads(thresholds.to_bytes())
    assert (
        stated["consistency"]["together"]
        and DriftThresholds.from_bytes(thresholds.to_bytes()).consistency == thresholds.consistency
    )
    del stated["consistency"]
    assert DriftThresholds.from_bytes(json.dumps(stated).encode()).consistency == CrossColumnModel()
    with pytest.raises(ProfileError, match="cannot be read"):
        DriftThresholds.from_bytes(json.dumps(stated | {"consistency": {"together": {"air": 1}}}).encode())


def test_a_column_that_cannot_be_read_as_times_is_no_obstacle():
    rows = weather(1, 0).drop(columns="time").assign(time=lambda f: np.arange(len(f)) * 0.5)
    assert not len(hourly_from_table(rows).hours) and not len(hourly_from_table(rows.drop(columns="time")).hours)
    clock = rows.assign(time=[f"{i % 24:02}:05" for i in range(len(rows))])
    assert not len(hourly_from_table(clock).hours)
    dated = rows.assign(time=[f"2013-07-04T{i % 24:02}:05+02:00" for i in range(len(rows))])
    assert str(hourly_from_table(dated).hours[0]) == "2013-07-03T22"
    with pytest.raises(ProfileError, match="'time' are not seconds"):
        hourly_from_table(rows, "time")


def test_few_ordinary_days_have_an_alarm(reference, thresholds):
    found = [bool(alarms(reference, thresholds, a_day(seed))) for seed in range(1000, 1060)]
    assert np.mean(found) <= 0.15  # 4% are to be expected; so many of 60 come by chance once in a thousand tests


def test_few_months_of_drawn_weeks_have_an_alarm(reference, thresholds, known):
    weeks = [
        Profile.of(known.iloc[at : at + 7 * ROWS]).to_bytes() for at in range(7 * ROWS, (DAYS - 7) * ROWS, 7 * ROWS)
    ]
    rng, found = np.random.default_rng(0), []
    for _ in range(60):
        month = Profile.merged(Profile.from_bytes(weeks[at]) for at in rng.integers(len(weeks), size=4)).columns
        found.append(
            bool(
                assess_window(
                    reference, Profile({n: c for n, c in month.items() if n != "decision_time"}), thresholds
                ).alarms
            )
        )
    assert np.mean(found) <= 0.15


FAULTS = {
    "shifted": ("distance", lambda f: f.assign(distance=f.distance + 260)),
    "other units": ("distance", lambda f: f.assign(distance=f.distance * 1.6)),
    "stuck": ("distance", lambda f: f.assign(distance=800.0)),
    "missing": ("distance", lambda f: f.assign(distance=f.distance.where(np.arange(len(f)) % 15 > 0))),
    "infinite": ("distance", lambda f: f.assign(distance=f.distance.where(np.arange(len(f)) % 15 > 0, np.inf))),
    "all missing": ("distance", lambda f: f.assign(distance=np.nan)),
    "texts": ("distance", lambda f: f.assign(distance=f.distance.astype(str))),
    "renamed": ("carrier", lambda f: f.assign(carrier=f.carrier.replace({"WN": "SWA"}))),
    "lost": ("carrier", lambda f: f[f.carrier != "DL"]),
    "numbers": ("carrier", lambda f: f.assign(carrier=f.carrier.map({"UA": 1, "DL": 2, "B6": 3, "WN": 4}))),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [1000, 1001, 1002])
def test_a_fault_is_the_first_alarm_of_its_day(name, seed, reference, thresholds):
    column, change = FAULTS[name]
    assert alarms(reference, thresholds, change(a_day(seed)))[0].column == column


def test_an_alarm_states_what_it_is(reference, thresholds):
    found = alarms(reference, thresholds, FAULTS["renamed"][1](a_day(1000)))[0]
    assert found.family == "input" and found.statistic in STATISTIC_NAMES and found.effect > found.threshold > 0
    assert (
        found.times_threshold == pytest.approx(found.effect / found.threshold)
        and f"{found.times_threshold:.1f} times the threshold" in found.words
    )


def test_a_report_says_how_often_it_is_wrong(reference, thresholds):
    found = assess_drift(
        compare(reference, {"2013-07-01": Profile.of(a_day(1000))}, window_size="day"), thresholds, "day"
    )
    message = " ".join(describe_alarms(found))
    assert found.windows[0].assessment.false_alarms_per_week == pytest.approx(0.04 * 7)
    assert "4% of reports" in message and "0.28 false ones a week" in message
    assert "marginal, not causal" in message


def test_what_could_have_moved_the_score(reference, thresholds):
    windy = table(30, 5, "2013-07-01").assign(wind=lambda f: f.wind + 10)
    windy["probability"] = 1 / (1 + np.exp(2 - windy["wind"] / 10))
    found = assess_window(reference, Profile.of(windy), thresholds, "month")
    assert found.score_shifts[0][0] == "wind" and found.score_shifts[0][1] > 0 and found.score_difference > 0


@pytest.mark.parametrize(
    ("frame", "message"),
    [(a_day(1).iloc[:100], "shorter than a day"), (a_day(1).iloc[::10], "24 rows, at least 50 are needed")],
    ids=["hours", "few rows"],
)
def test_what_cannot_be_judged_is_not(frame, message, reference, thresholds):
    found = assess_window(reference, Profile.of(frame), thresholds, "day")
    assert not found.is_assessed and message in found.note and found.alarms == []


def office_hours(days, seed, start, hours=(8, 18), shift=0.0):
    "Decisions within the same hours of each day"
    rng, moments = np.random.default_rng(seed), pd.date_range(start, periods=days)
    seconds = np.sort(rng.integers(hours[0] * 3600, hours[1] * 3600, (days, 300)), 1)
    times = (moments.to_numpy()[:, None] + seconds.astype("timedelta64[s]")).ravel()
    return pd.DataFrame({"decision_time": times, "distance": rng.normal(10 + shift, 2, len(times))})


def test_a_day_is_as_long_as_a_day_of_the_reference():
    known = office_hours(60, 0, "2013-01-01")
    thresholds, reference = calibrate(known), Profile.of(known)
    judged = lambda by="day", **of: assess_window(
        reference, Profile.of(office_hours(1, 1, "2013-07-04", **of)), thresholds, by
    )
    assert judged().is_assessed and judged().alarms == []
    assert [alarm.column for alarm in judged(shift=5.0).alarms] == ["distance"]
    assert "shorter than a day" in judged(hours=(8, 11), shift=5.0).note and "shorter than a day" in judged("hour").note
    assert DriftThresholds.from_bytes(thresholds.to_bytes()).day_span == pytest.approx(10 / 24, abs=0.01)


def test_a_service_that_decides_once_a_day_is_judged():
    known = office_hours(60, 0, "2013-01-01").assign(decision_time=lambda f: f.decision_time.dt.normalize())
    thresholds, day = calibrate(known), office_hours(1, 1, "2013-07-04", shift=5.0)
    day["decision_time"] = day.decision_time.dt.normalize()
    assert [alarm.column for alarm in assess_window(Profile.of(known), Profile.of(day), thresholds, "day").alarms] == [
        "distance"
    ]


def test_another_schema_is_judged_by_what_is_common(reference, thresholds):
    found = assess_window(
        reference, Profile.of(a_day(1)[["decision_time", "distance"]].assign(new=1)), thresholds, "day"
    )
    assert found.is_assessed and {alarm.column for alarm in found.alarms} <= {"distance"}


def test_too_few_days_is_a_sentence(known):
    with pytest.raises(ProfileError, match="8 complete days"):
        calibrate(known.iloc[: 10 * ROWS])


def test_a_null_survives_its_bytes_and_a_damaged_one_is_refused(thresholds):
    again = DriftThresholds.from_bytes(thresholds.to_bytes())
    assert again.to_bytes() == thresholds.to_bytes() and again.families == thresholds.families
    for damaged in (b"", b"{}", thresholds.to_bytes()[:100], b'{"format": 2}', b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(ProfileError, match="mlnb run"):
            DriftThresholds.from_bytes(damaged)


def test_columns_that_say_nothing_are_no_obstacle():
    rng = np.random.default_rng(0)
    odd = {"nothing": np.full(300, np.nan), "constant": np.full(300, 5.0), "endless": np.full(300, np.inf), "x": None}
    days = {str(day): Profile.of(odd | {"x": rng.normal(size=300)}) for day in range(40)}
    thresholds, reference = thresholds_from_days(days), Profile.merged(days.values())
    assert assess_window(reference, Profile.of(odd | {"x": rng.normal(size=300)}), thresholds, "day").alarms == []
    found = assess_window(
        reference, Profile.of(odd | {"constant": np.full(300, 6.0), "x": rng.normal(size=300)}), thresholds, "day"
    )
    assert found.alarms[0].column == "constant"


def test_rows_without_a_score_tell_nothing_of_it(known):
    odd = known.assign(probability=known.probability.where(np.arange(len(known)) != 17, np.nan))
    with_them, without = (calibrate(frame).scores["carrier"] for frame in (odd, known.drop(index=17)))
    assert with_them == without and json.loads(calibrate(odd).to_bytes())


def test_segments_are_named_as_column_and_value():
    with pytest.raises(ProfileError, match="origin=JFK"):
        RowFilter(segment="JFK")


def mlnb(project, *arguments):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLNB_")}
    return warm_cli.run(["drift", *arguments], cwd=project, env=environ)


def test_the_command(tmp_path, known, reference, thresholds):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    for folder, rows in {"": known, "/segments/carrier=UA": known[known.carrier == "UA"]}.items():
        Profile.of(rows).write(tmp_path / f"products/bundle{folder}/reference.profile")
    (tmp_path / "products/bundle/drift.json").write_bytes(thresholds.to_bytes())
    FAULTS["other units"][1](a_day(1000)).to_parquet(tmp_path / "today.parquet")
    done = mlnb(
        tmp_path, "today.parquet", "--window", "day", "--json", "--metrics", "drift.prom", "--html", "drift.html"
    )
    window = json.loads(done.stdout)["windows"][0]
    assert window["assessment"]["alarms"][0]["column"] == "distance" and window["assessment"][
        "false_alarms_per_week"
    ] == pytest.approx(0.28)
    assert 'mlnb_drift_effect_threshold_ratio{column="distance"' in (tmp_path / "drift.prom").read_text()
    assert "<h2>Alarms</h2>" in (tmp_path / "drift.html").read_text()
    assert "distance" in mlnb(tmp_path, "today.parquet").stdout.splitlines()[0]
    segment = mlnb(tmp_path, "today.parquet", "--where", "carrier=UA").stdout
    assert "reference of carrier=UA" in segment and "no drift thresholds" in segment
    assert "only for: carrier=UA" in mlnb(tmp_path, "today.parquet", "--where", "carrier=DL").stderr
    assert "no column 'model_version'" in mlnb(tmp_path, "today.parquet", "--version", "v1").stderr


@pytest.mark.long
def test_the_command_knows_the_hours_of_a_table(tmp_path, knows_weather):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    Profile.of(weather(140, 0)).write(tmp_path / "products/bundle/reference.profile")
    (tmp_path / "products/bundle/drift.json").write_bytes(knows_weather[1].to_bytes())
    off = WEATHER["a sensor that is off"][2](weather(4, 100, "2013-07-01"))
    off.to_parquet(tmp_path / "days.parquet")
    off.drop(columns="time").assign(time=range(len(off))).to_parquet(tmp_path / "timeless.parquet")
    windows = json.loads(mlnb(tmp_path, "days.parquet", "--window", "day", "--json", "--html", "drift.html").stdout)[
        "windows"
    ]
    alarms = {w["window"]: {alarm["column"]: alarm for alarm in w["assessment"]["alarms"]} for w in windows}
    assert "air" not in alarms["2013-07-01"] and alarms["2013-07-02"]["air"]["statistic"] == "together"
    assert len(alarms["2013-07-03"]["air"]["hourly_series"]["hours"]) == 24
    assert "air by hour" in (tmp_path / "drift.html").read_text()
    message = mlnb(tmp_path, "days.parquet", "--window", "day").stdout
    assert "2013-07-02" in message and "air (" in message
    assert "misfit with other columns" in mlnb(tmp_path, "days.parquet").stdout
    assert "alarm" in mlnb(tmp_path, "timeless.parquet").stdout  # judged without hours


def test_a_bundle_without_a_null_gives_effect_sizes_alone(tmp_path, known):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    Profile.of(known).write(tmp_path / "products/bundle/reference.profile")
    a_day(1).to_parquet(tmp_path / "today.parquet")
    message = mlnb(tmp_path, "today.parquet").stdout
    assert "no drift thresholds" in message and "PSI" in message


def test_ten_thousand_columns():
    rng = np.random.default_rng(0)
    before, now = (Profile.of({f"x{i}": rng.normal(size=60) for i in range(10_000)}) for _ in range(2))
    assert len(compare(before, {"now": now}).windows[0].columns) == 10_000
