"""The page of performance: what a reader sees first, and on a phone."""

import numpy as np
import pyarrow as pa
import pytest

from mlnb.cli.performance import headline
from mlnb.models.binary import Binary, cost_objective
from mlnb.models.metrics import Cost
from mlnb.monitoring.performance import measure_performance
from mlnb.monitoring.performance_page import days_chart, page

ROWS = 2000


def performance(as_of="2013-08-10", useless=False):
    "Twenty days of decisions with outcomes; the useless model alerts where nothing comes"
    rng = np.random.default_rng(0)
    times = np.datetime64("2013-07-01T00:00") + np.arange(ROWS) * np.timedelta64(14, "m")
    p = rng.beta(1.5, 4, ROWS)
    utc = lambda moments: pa.array(moments.astype("datetime64[us]")).cast(pa.timestamp("us", "UTC"))
    keys, known = [f"e{i}" for i in range(ROWS)], utc(times + np.timedelta64(5, "h"))
    alike = {"model_version": ["v1"] * ROWS, "arm": ["champion"] * ROWS}
    asked = {
        "entity": keys,
        "time": utc(times),
        "logged_at": utc(times),
        **alike,
        "probability": p,
        "decision": p >= 1 / 3,
    }
    y = (rng.random(ROWS) < (1 - p if useless else p)) * 1.0
    told = {"entity": keys, "value": y, "observed_at": known, "received_at": known, "source": ["x"] * ROWS}
    tables, end = (pa.table(asked), pa.table(told)), np.datetime64(as_of, "s")
    return measure_performance(*tables, Binary(), 24, end, objective=cost_objective(Cost(1, 3)))


def test_days_that_wait_are_grey_and_named_and_no_others():
    done, waits = performance(), performance("2013-07-20")
    chart = lambda found: days_chart(found.days, "auc", found.shown_metrics["auc"])
    assert 'class="waits"' not in chart(done) and "labels still to come" not in page(done, "")
    assert 'class="waits"' in chart(waits) and "labels still to come" in page(waits, "")


@pytest.mark.parametrize(("useless", "colour"), [(False, "none"), (True, "moderate")])
def test_the_headline_is_green_only_where_the_model_saves(useless, colour):
    found = performance(useless=useless)
    assert (found.overall.realised["cost_per_1000"] > found.best_trivial) == found.is_worse_than_constant == useless
    assert f'<p class="say {colour}">' in page(found, "")


def test_the_page_says_what_the_terminal_says():
    found = performance()
    shown = page(found, "")
    assert "<th>ECE</th>" in shown and f"<b>{found.months[0].realised['ece']:.3f}</b>" in shown
    best = found.details["best_threshold"]
    least = f"would have cost least: {best['cost_per_1000']:.0f} per 1000"
    assert f"a threshold of {best['threshold']:.2f} {least}" in shown
    assert shown.index(">realised") < shown.index("<svg")
    assert "min-width" in shown and shown.count('<div class="scroll"><svg class="days"') == 4


def test_the_headline_counts_those_that_wait():
    assert headline(performance()).endswith("100.0% of them have a label.")
    waits = performance("2013-07-20")
    count = sum(d.decisions for d in waits.days if not d.closed)
    assert headline(waits).endswith(f"100.0% of them have a label; {count} more are waiting for labels.")
