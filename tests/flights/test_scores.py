"""What the reference pipeline has to reach on July to December, fixed before it was run."""

import json
from pathlib import Path

import pandas as pd
import pytest

from mlnb.project.settings import find_root

PRODUCTS = find_root(Path(__file__).parent) / "products/flights"
MIN_SCORES = {"auc": 0.755, "pr_auc": 0.56}
MAX_SCORES = {"log_loss": 0.476, "ece": 0.015, "cost_per_1000": 615}


@pytest.fixture(scope="module")
def scores_file() -> dict:
    if not (PRODUCTS / "scores.json").exists():
        pytest.skip("products/flights/scores.json is not there; make it with: mlnb run")
    if len(json.loads((PRODUCTS / "history.json").read_text())["epochs"]) < 4:
        pytest.skip(
            "the network was trained for too few epochs to be judged; run the pipeline with its own settings: mlnb run"
        )
    return json.loads((PRODUCTS / "scores.json").read_text())


def test_the_network_reaches_its_bars(scores_file):
    overall = scores_file["models"]["tabular network"]["overall"]
    assert {name: overall[name] for name, bar in MIN_SCORES.items() if overall[name] < bar} == {}
    assert {name: overall[name] for name, bar in MAX_SCORES.items() if overall[name] > bar} == {}


def test_it_costs_less_than_the_best_trivial_policy_in_every_month(scores_file):
    months = scores_file["models"]["tabular network"]["month"]
    assert list(months) == ["7", "8", "9", "10", "11", "12"]
    assert [m for m, s in months.items() if s["cost_per_1000"] >= s["best_trivial"]] == []


def test_it_beats_every_baseline(scores_file):
    costs = {name: s["overall"]["cost_per_1000"] for name, s in scores_file["models"].items()}
    assert set(costs) == {
        "base rate",
        "carrier-hour means",
        "logistic regression",
        "gradient boosting",
        "tabular network",
    }
    assert costs["tabular network"] <= min(
        costs["base rate"], costs["carrier-hour means"], costs["logistic regression"]
    )


def test_scores_name_every_model_overall_and_by_month(scores_file):
    names = {"rows", "base_rate", "auc", "pr_auc", "log_loss", "ece", "cost_per_1000", "best_trivial"}
    for scores in scores_file["models"].values():
        assert set(scores) == {"overall", "month", "origin"} and list(scores["month"]) == [
            "7",
            "8",
            "9",
            "10",
            "11",
            "12",
        ]
        assert all(set(s) == names for s in (scores["overall"], *scores["month"].values(), *scores["origin"].values()))


def test_predictions_have_one_row_a_flight(scores_file):
    rows = pd.read_parquet(PRODUCTS / "predictions.parquet")
    key = ["carrier", "flight", "origin", "scheduled_departure"]
    assert {*key, "probability"} <= set(rows) and not rows.duplicated(key).any()
    assert str(rows["scheduled_departure"].dt.tz) == "UTC"
    local = rows["scheduled_departure"].dt.tz_convert("America/New_York")
    assert set(local.dt.year) == {2013} and set(local.dt.month) == {7, 8, 9, 10, 11, 12}
    assert rows["probability"].between(0, 1).all()
    assert len(rows) == scores_file["models"]["tabular network"]["overall"]["rows"]
