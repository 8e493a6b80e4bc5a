import numpy as np
import pytest
from sklearn import metrics as peer

from mlnb.models.metrics import (
    Cost,
    calibration_error,
    cost_curve,
    log_loss,
    ranking_scores,
    reliability_curve,
    scores,
    scores_by_group,
)
from mlnb.project.errors import ModelError


@pytest.fixture
def rows():
    rng = np.random.default_rng(1)
    p = rng.beta(1, 3, 5_000)
    return (rng.random(5_000) < p).astype(int), p


def test_scores_are_those_of_scikit_learn(rows):
    y, p = rows
    ours = scores(y, p)
    assert ours["auc"] == peer.roc_auc_score(y, p)
    assert ours["pr_auc"] == pytest.approx(peer.average_precision_score(y, p), abs=1e-12)
    assert ours["log_loss"] == pytest.approx(peer.log_loss(y, p), abs=1e-12)
    assert (ours["rows"], ours["base_rate"]) == (5_000, y.mean())


def test_cost_counts_alerts_and_misses_one_by_one(rows):
    y, p = rows
    cost = Cost(positive=2, false_negative=7)
    spent = sum(2 if q >= 2 / 7 else 7 * label for label, q in zip(y, p, strict=True))
    ours = scores(y, p, cost)
    assert ours["cost_per_1000"] == pytest.approx(1000 * spent / len(y))
    assert ours["best_trivial"] == pytest.approx(min(2000, 7000 * y.mean()))


def test_a_probability_on_the_threshold_is_an_alert():
    assert Cost(1, 3).decide([1 / 3, np.nextafter(1 / 3, 0)]).tolist() == [True, False]


@pytest.mark.parametrize(("positive", "false_negative"), [(0, 3), (3, 3), (4, 3), (-1, 3), (1, np.inf), (np.nan, 3)])
def test_costs_without_a_decision_are_refused(positive, false_negative):
    with pytest.raises(ModelError, match="write 0 < positive < false_negative"):
        Cost(positive, false_negative)


def test_calibration_error_is_that_of_pandas_quantile_bins(rows):
    import pandas as pd

    y, p = rows
    bins = pd.qcut(p, 15, duplicates="drop")
    table = pd.DataFrame({"y": y, "p": p}).groupby(bins, observed=True)
    expected = float((table.size() / len(p) * (table.y.mean() - table.p.mean()).abs()).sum())
    assert calibration_error(y, p) == pytest.approx(expected, abs=1e-12)


def test_calibration_of_few_distinct_probabilities_is_by_value():
    predicted, observed, rows = reliability_curve([0, 1, 1, 1], [0.2, 0.2, 0.9, 0.9])
    assert (predicted.tolist(), observed.tolist(), rows.tolist()) == ([0.2, 0.9], [0.5, 1.0], [2, 2])
    assert calibration_error([0, 1, 1, 1], [0.2, 0.2, 0.9, 0.9]) == pytest.approx(0.2)


def test_tied_quantiles_lose_no_row():
    p = np.r_[np.full(900, 0.1), np.linspace(0.2, 0.9, 100)]
    assert reliability_curve(np.zeros(1000), p)[2].sum() == 1000


def test_one_class_has_loss_and_cost_but_no_ranking():
    ours = scores(np.ones(4), [0.2, 0.4, 0.6, 0.9])
    assert np.isnan(ours["auc"]) and np.isnan(ours["pr_auc"])
    assert ours["cost_per_1000"] == 1000 * (3 * 1 + 1 * 3) / 4
    assert np.isfinite(ours["log_loss"])


def test_certain_and_wrong_is_dear_but_finite():
    assert 30 < log_loss([1], [0.0]) < 40


@pytest.mark.parametrize(
    ("y", "p", "words"),
    [
        ([], [], "no rows"),
        ([0, 1], [0.5], "equal length"),
        ([[0, 1]], [[0.5, 0.5]], "one-dimensional"),
        ([0, 2], [0.1, 0.1], "1 of 2 labels are neither 0 nor 1"),
        ([0, np.nan], [0.1, 0.1], "1 of 2 labels"),
        ([0, 1], [0.1, np.nan], "1 of 2 probabilities"),
        ([0, 1], [-0.1, 1.1], "2 of 2 probabilities"),
    ],
)
@pytest.mark.parametrize("score", [scores, ranking_scores, log_loss, calibration_error, cost_curve])
def test_rows_that_cannot_be_scored_are_named(score, y, p, words):
    with pytest.raises(ModelError, match=words):
        score(y, p)


def test_groups_are_scored_apart(rows):
    y, p = rows
    month = np.arange(len(y)) % 3
    table = scores_by_group(month, y, p)
    assert list(table) == ["0", "1", "2"]
    assert table["1"] == scores(y[month == 1], p[month == 1])
    with pytest.raises(ModelError, match="each row needs its group"):
        scores_by_group(month[:5], y, p)


def test_cost_curve_agrees_with_deciding_at_each_threshold(rows):
    y, p = rows
    cost = Cost()
    thresholds, costs = cost_curve(y, p, cost)
    for t, spent in zip(thresholds, costs, strict=True):
        assert spent == pytest.approx(cost.per_1000(y, p >= t))
