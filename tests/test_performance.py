"""Flights replayed hour by hour with their labels as they came in; and performance by the definition, row by row."""

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from mlnb.models.binary import Binary, cost_objective
from mlnb.models.metrics import Cost, calibration_error, log_loss, scores
from mlnb.monitoring.performance import join_labels, measure_performance
from mlnb.project.errors import ModelError
from mlnb.serving.labels import current_labels

FLIGHTS = Path(__file__).parent.parent / "products" / "flights"
COST, START = Cost(1, 3), np.datetime64("2013-07-01T00:00")
OBJECTIVE, BINARY = cost_objective(COST), Binary()
measure_performance = partial(measure_performance, objective=OBJECTIVE)


def as_utc(times):
    return pa.array(np.asarray(times).astype("datetime64[us]")).cast(pa.timestamp("us", "UTC"))


def decisions(entity, time, p, **more):
    n = len(p)
    own = {
        "entity": list(entity),
        "time": as_utc(time),
        "logged_at": as_utc(time),
        "model_version": ["v1"] * n,
        "arm": ["champion"] * n,
    }
    return pa.table(own | {"probability": np.asarray(p, float), "decision": np.asarray(p) >= 1 / 3} | more)


def labels(entity, value, observed, received=None):
    n, received = len(value), observed if received is None else received
    columns = {"entity": list(entity), "value": np.asarray(value, float), "observed_at": as_utc(observed)}
    return pa.table(columns | {"received_at": as_utc(received), "source": ["test"] * n})


@pytest.fixture(scope="module")
def july():
    "Decisions and outcomes of two weeks of flights"
    if not (FLIGHTS / "predictions.parquet").is_file():
        pytest.skip("the reference pipeline has not run; run it with: mlnb run")
    key = ["carrier", "flight", "origin", "scheduled_departure"]
    told = pd.read_parquet(FLIGHTS / "features.parquet", columns=[*key, "decision_time", "label_time"])
    made = pd.read_parquet(FLIGHTS / "predictions.parquet")
    made["scheduled_departure"] = made["scheduled_departure"].dt.tz_convert(None)
    rows = made.merge(told, on=key)
    rows = rows[rows.decision_time < "2013-07-15"]
    name = rows.carrier + "/" + rows.flight.astype(str) + "/" + rows.origin + "/" + rows.scheduled_departure.astype(str)
    return (
        decisions(
            name, rows.decision_time, rows.probability, decision=rows.decision.to_numpy(), segment=rows.origin.tolist()
        ),
        labels(name, rows.disrupted, rows.label_time),
    )


@pytest.mark.long
def test_hour_by_hour_no_day_is_scored_early_and_the_end_equals_the_batch(july):
    asked, told = july
    observed = told["observed_at"].to_numpy()
    scored: dict = {}
    for hour in range(24, 17 * 24):
        as_of = START + np.timedelta64(hour, "h")
        arrived = told.filter(observed <= as_of.astype("datetime64[us]"))  # nothing else is there yet
        found = measure_performance(asked, arrived, BINARY, 24, as_of, samples=0)
        for day in found.days:
            over = np.datetime64(day.name) + np.timedelta64(48, "h") <= as_of
            assert day.closed == over == (day.realised is not None), f"{day.name} at {as_of}"
            if over:
                assert day.coverage == 1 and scored.setdefault(day.name, day) == day  # what has been scored stays so
    batch = measure_performance(asked, told, BINARY, 24, np.datetime64("2014-01-01"), samples=0)
    assert set(scored) == {day.name for day in batch.days} and len(scored) == 14
    for day in batch.days:
        rows = asked["time"].to_numpy().astype("datetime64[D]") == np.datetime64(day.name)
        y, p, positive_decisions = (
            told["value"].to_numpy()[rows],
            asked["probability"].to_numpy()[rows],
            asked["decision"].to_numpy()[rows],
        )
        by_hand = {
            "auc": roc_auc_score(y, p),
            "log_loss": log_loss(y, p),
            "ece": calibration_error(y, p),
            "base_rate": y.mean(),
        }
        by_hand["cost_per_1000"] = COST.per_1000(y, positive_decisions)
        for name, value in by_hand.items():
            assert abs(scored[day.name].realised[name] - value) < 1e-9 and abs(day.realised[name] - value) < 1e-9
    whole = found.overall.realised
    assert all(abs(whole[name] - value) < 1e-9 for name, value in batch.overall.realised.items())


def test_labels_that_are_early_would_have_lied(july):
    asked, told = july
    noon = np.datetime64("2013-07-10T22:00")
    early = told.filter(told["observed_at"].to_numpy() <= noon.astype("datetime64[us]"))
    both = join_labels(asked, current_labels(early), BINARY)
    recent = asked["time"].to_numpy()
    recent = (recent <= noon) & (recent > noon - np.timedelta64(6, "h"))
    share, rate = np.mean(both.known[recent]), both.labels[recent & both.known].mean()
    in_the_end = join_labels(asked, current_labels(told), BINARY).labels[recent].mean()
    assert share < 0.5 and abs(rate - in_the_end) > 0.05


def test_the_same_numbers_in_any_order(july):
    asked, told = july
    rng = np.random.default_rng(0)
    end = np.datetime64("2014-01-01")
    one = measure_performance(asked, told, BINARY, 24, end, segment="origin")
    mixed = pa.concat_tables([told, told]).take(rng.permutation(2 * len(told)))
    other = measure_performance(asked.take(rng.permutation(len(asked))), mixed, BINARY, 24, end, "origin")
    for a, b in zip(
        [one.overall, *one.days, *one.segments], [other.overall, *other.days, *other.segments], strict=True
    ):
        assert (a.name, a.decisions, a.known) == (b.name, b.decisions, b.known)
        assert all(abs(a.realised[name] - b.realised[name]) < 1e-9 for name in a.realised)
    low, high = one.overall.interval["cost_per_1000"]
    assert low < one.overall.realised["cost_per_1000"] < high


def slowly(rows, told):
    "Which predictions count, by the rule as it is written: (entity, shadow) -> probability and label"
    held: dict = {}
    for key in {(r[0], r[2] == "shadow") for r in rows}:
        mine = [r for r in rows if (r[0], r[2] == "shadow") == key]
        first_day = min(r[1] for r in mine).astype("datetime64[D]")
        mine = [r for r in mine if r[1].astype("datetime64[D]") == first_day]
        known = [o for o in told if o[0] == key[0]]
        first = min((o[2] for o in known), default=None)
        before = [r for r in mine if first is None or r[1] <= first]
        chosen = max(before or mine, key=lambda r: r[1])
        last = max(known, key=lambda o: (o[2], o[3]))[1] if known and before else None
        held[key] = (chosen[3], last)
    return held


@pytest.mark.parametrize("seed", range(30))
def test_which_prediction_counts(seed):
    rng = np.random.default_rng(seed)
    minutes = rng.permutation(3 * 1440)[:300]
    moments = START + minutes * np.timedelta64(1, "m")
    rows = [
        (f"e{rng.integers(80)}", t, rng.choice(["champion", "challenger", "shadow"]), round(rng.random(), 9))
        for t in moments
    ]
    seen = START + rng.permutation(4 * 1440)[:100] * np.timedelta64(1, "m")
    told = [(f"e{rng.integers(90)}", float(rng.integers(2)), t, t + rng.integers(60)) for t in seen]
    entity, time, arm, p = zip(*rows, strict=True)
    known = current_labels(labels(*zip(*told, strict=True)))
    both = join_labels(decisions(entity, time, p, arm=pa.array(map(str, arm))), known, BINARY)
    held = slowly(rows, told)
    found = [label if known else None for label, known in zip(both.labels.tolist(), both.known, strict=True)]
    found = sorted(zip(both.outputs["probability"], found, strict=True), key=lambda pair: pair[0])
    assert found == sorted(held.values(), key=lambda pair: pair[0])
    assert both.repeated == 300 - len(held)


@pytest.mark.parametrize("seed", range(10))
def test_which_of_several_of_one_second_counts_is_not_a_matter_of_their_order(seed):
    rng, n = np.random.default_rng(seed), 200
    version = [f"v{i}" for i in rng.integers(3, size=n)]
    asked = decisions(
        [f"e{i}" for i in rng.integers(20, size=n)], np.full(n, START), rng.random(n).round(1), model_version=version
    )
    told = current_labels(labels(["e0"], [1], np.array([START + 60])))
    counted = lambda both: sorted(zip(both.version, *both.outputs.values(), strict=True))
    mixed = asked.take(rng.permutation(n))
    assert counted(join_labels(asked, told, BINARY)) == counted(join_labels(mixed, told, BINARY))


def test_a_later_correction_changes_the_day_and_an_older_moment_does_not_know_it():
    moments = START + np.arange(20) * np.timedelta64(1, "h")
    asked = decisions(map(str, range(20)), moments, np.linspace(0, 1, 20))
    told = labels(map(str, range(20)), np.arange(20) % 2, moments + np.timedelta64(3, "h"))
    corrected = pa.concat_tables([told, labels(["0"], [1], [np.datetime64("2013-07-20T00:00")])])
    rate = lambda table, day: measure_performance(asked, table, BINARY, 24, np.datetime64(day)).overall.realised[
        "base_rate"
    ]
    assert rate(corrected, "2013-07-19") == rate(told, "2013-07-21") == 0.5 and rate(corrected, "2013-07-21") == 0.55


def test_coverage_is_shown_and_a_day_without_outcomes_has_no_figures():
    moments = START + np.arange(48) * np.timedelta64(1, "h")
    asked = decisions(map(str, range(48)), moments, np.linspace(0, 1, 48))
    told = labels(map(str, range(12)), np.arange(12) % 2, moments[:12] + np.timedelta64(3, "h"))
    found = measure_performance(asked, told, BINARY, 24, np.datetime64("2013-08-01"))
    assert (
        [d.coverage for d in found.days] == [0.5, 0]
        and found.days[1].realised is None
        and found.days[1].expected["cost_per_1000"] > 0
    )
    assert found.overall.coverage == 0.25 and found.to_dict()["overall"]["coverage"] == 0.25


def test_a_shadow_stands_beside_and_changes_no_answered_figure():
    moments = START + np.arange(24) * np.timedelta64(1, "h")
    asked = decisions(map(str, range(24)), moments, np.linspace(0, 1, 24))
    shadow = decisions(
        map(str, range(24)), moments, np.linspace(1, 0, 24), arm=["shadow"] * 24, model_version=["v2"] * 24
    )
    told = labels(map(str, range(24)), np.arange(24) > 11, moments + np.timedelta64(3, "h"))
    alone, both = (
        measure_performance(t, told, BINARY, 24, np.datetime64("2013-08-01"))
        for t in (asked, pa.concat_tables([asked, shadow]))
    )
    assert alone.overall == both.overall and alone.months == both.months and both.repeated == 0
    assert [(g.name, g.realised["auc"]) for g in both.versions] == [("v1", 1), ("v2 (shadow)", 0)]
    assert [g.name for g in both.arms] == ["champion", "shadow"]


def test_one_class_one_row_and_nothing():
    asked = decisions(["a"], [START], [0.7])
    told = labels(["a"], [1], [START + np.timedelta64(5, "h")])
    found = measure_performance(asked, told, BINARY, 24, np.datetime64("2013-08-01")).to_dict()
    assert found["overall"]["realised"]["auc"] is None and found["overall"]["realised"]["cost_per_1000"] == 1000
    with pytest.raises(ModelError, match="no decision"):
        measure_performance(asked, told, BINARY, 24, START - np.timedelta64(1, "h"))
    with pytest.raises(ModelError, match="no decision"):
        measure_performance(asked.slice(0, 0), told.slice(0, 0), BINARY, 24, np.datetime64("2013-08-01"))
    assert measure_performance(asked, told.slice(0, 0), BINARY, 24, np.datetime64("2013-08-01")).overall.known == 0


def test_a_probability_that_is_none_is_left_out_and_counted():
    asked = decisions(list("abcde"), [START] * 5, [0.7, np.nan, np.inf, -0.1, 1.0])
    told = labels(list("abcde"), [1] * 5, [START + np.timedelta64(5, "h")] * 5)
    found = measure_performance(asked, told, BINARY, 24, np.datetime64("2013-08-01"))
    assert (found.unusable, found.overall.decisions, found.unmatched) == (3, 2, 3)


def test_a_window_is_counted_from_the_end_of_the_day():
    asked = decisions(["a"], [START + np.timedelta64(23, "h")], [0.7])
    told = labels(["a"], [1], [START + np.timedelta64(24, "h")])
    closed = lambda hours, text: measure_performance(asked, told, BINARY, hours, np.datetime64(text)).overall.closed
    assert not closed(24, "2013-07-02T23:59:59") and closed(24, "2013-07-03T00:00:00") and closed(1, "2013-07-02T01:00")


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        storm = np.repeat(rng.normal(0, 0.15, 30), 60)
        p = np.clip(rng.beta(2, 5, 1800), 0.01, 0.99)
        y = rng.random(1800) < np.clip(p + storm, 0, 1)
        moments = START + np.arange(1800) * np.timedelta64(24, "m")
        asked, told = (
            decisions(map(str, range(1800)), moments, p),
            labels(map(str, range(1800)), y, moments + np.timedelta64(3, "h")),
        )
        low, high = measure_performance(asked, told, BINARY, 24, np.datetime64("2013-10-01")).overall.interval[
            "base_rate"
        ]
        truth = 0.2936  # of 2,000,000 rows drawn alike
        covered += low <= truth <= high
    assert covered >= 15


SCORES = {  # as many distinct ones, and as unevenly spread, as models give
    "one": lambda rng, n: np.full(n, 0.3),
    "two": lambda rng, n: rng.choice([0.1, 0.8], n, p=[0.999, 0.001]),
    "as many as bins": lambda rng, n: rng.choice(np.linspace(0.05, 0.95, 15), n),
    "one more than bins": lambda rng, n: rng.choice(np.linspace(0.05, 0.95, 16), n),
    "nearly all alike": lambda rng, n: np.where(rng.random(n) < 0.95, 0.2, rng.random(n)),
    "rounded": lambda rng, n: np.round(rng.beta(2, 5, n), 2),
    "all different": lambda rng, n: rng.beta(2, 5, n),
    "nearly certain": lambda rng, n: rng.beta(0.01, 2, n),
    "the best at the very top": lambda rng, n: np.where(rng.random(n) < 0.001, 0.99, rng.random(n) * 0.01),
    "0 and 1": lambda rng, n: (rng.random(n) < 0.3).astype(float),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    "truth", [lambda p: p, lambda p: p**2 / (p**2 + (1 - p) ** 2), lambda p: 0.5 + 0 * p], ids=["a", "b", "c"]
)
def test_an_interval_contains_the_figure_that_it_is_of(name, truth):
    "Whichever way scores are spread, the figure and its interval are made of the same bins, losses, costs and ties"
    rng = np.random.default_rng(1)
    p = SCORES[name](rng, 6000)
    y, day = (rng.random(6000) < truth(p)).astype(float), np.arange(6000) // 200
    answers = {"probability": p, "decision": COST.decide(p)}
    found, spans = BINARY.realised(y, answers, OBJECTIVE), BINARY.intervals(day, y, answers, OBJECTIVE)
    plain = scores(y.astype(int), p, COST)
    for figure, (low, high) in spans.items():
        assert low <= found[figure] <= high, (figure, low, found[figure], high)
        assert abs(plain[figure] - found[figure]) < 1e-12 * max(1, abs(found[figure]))
    assert set(spans) == {figure for figure, value in found.items() if value == value}


def test_the_interval_of_the_calibration_error_covers_the_truth():
    "Also a true error of 0, which no observed error reaches"
    gaps = {0.0: lambda p: p, 0.05: lambda p: p + 0.05}
    covered = dict.fromkeys(gaps, 0)
    for truth, of in gaps.items():
        for seed in range(40):
            rng = np.random.default_rng(seed)
            p = 0.9 * rng.beta(2, 5, 3000)
            y = (rng.random(3000) < of(p)).astype(float)
            low, high = BINARY.intervals(np.arange(3000) // 100, y, {"probability": p})["ece"]
            covered[truth] += low <= truth <= high
    assert min(covered.values()) >= 36, covered


def test_decisions_before_an_outcome_that_came_back_in_time():
    now = datetime(2013, 7, 1, 5, tzinfo=UTC)
    asked = decisions(["a"], [now.replace(tzinfo=None)], [0.7])
    told = labels(["a"], [1], [(now - timedelta(hours=1)).replace(tzinfo=None)])
    found = measure_performance(asked, told, BINARY, 24, np.datetime64("2013-08-01"))
    assert found.early == 1 and found.overall.realised is None
