"""What the flight models refuse, and what they write."""

import json

import numpy as np
import pandas as pd
import pytest

from mlnb.flights.evaluate import BASELINES, NETWORK, all_scores, carrier_hour_means, check_plausible_auc, write_scores
from mlnb.flights.features import CATEGORICAL, NUMERIC
from mlnb.flights.train import between, inputs
from mlnb.models.metrics import Cost
from mlnb.models.training import TrainingConfig, fit
from mlnb.project.errors import ModelError


def table(n=3_000, seed=0):
    "Made-up rows of the features task: late with the backlog, two carriers, July and August"
    rng = np.random.default_rng(seed)
    rows = {name: rng.choice(["a", "b", "c"], n) for name in CATEGORICAL} | {
        name: rng.normal(size=n) for name in NUMERIC
    }
    rows["wind_gust"] = np.where(rng.random(n) < 0.8, np.nan, rows["wind_gust"])
    rows["month"] = np.arange(n) % 2 + 7
    rows["disrupted"] = (rng.random(n) < 1 / (1 + np.exp(1.2 - rows["backlog"]))).astype(np.int8)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def parts():
    return table(), table(1_000, 1), table(2_000, 2)


@pytest.mark.parametrize("name", BASELINES)
def test_each_baseline_gives_a_probability_for_each_flight(parts, name):
    p = BASELINES[name](*parts)
    assert p.shape == (2_000,) and p.dtype == np.float64 and ((p > 0) & (p < 1)).all()


def test_the_models_learn_what_there_is_to_learn(parts):
    train, valid, test = parts
    probabilities = {name: model(*parts) for name, model in BASELINES.items()}
    config = TrainingConfig(epochs=8, batch=256, width=32, device="cpu")
    trained = fit(inputs(train), train["disrupted"], inputs(valid), valid["disrupted"], CATEGORICAL, NUMERIC, config)
    probabilities[NETWORK] = trained.predictor.predict(inputs(test))
    model_scores = all_scores(test, probabilities, Cost())
    for name in ("logistic regression", "gradient boosting", NETWORK):
        assert 0.65 < model_scores[name]["overall"]["auc"] < 0.80
        assert model_scores[name]["overall"]["cost_per_1000"] < model_scores["base rate"]["overall"]["cost_per_1000"]
    assert list(model_scores[NETWORK]["month"]) == ["7", "8"] and list(model_scores[NETWORK]["origin"]) == [
        "a",
        "b",
        "c",
    ]


def test_an_unseen_carrier_gets_the_base_rate():
    train = pd.DataFrame({"carrier": ["UA"] * 10, "hour": ["08"] * 10, "disrupted": [1] * 3 + [0] * 7})
    test = pd.DataFrame({"carrier": ["ZZ", "UA"], "hour": ["08", "09"]})
    assert carrier_hour_means(train, None, test).tolist() == [0.3, 0.3]


def test_a_leak_gives_itself_away_by_its_score(parts):
    leaking = [
        rows.assign(backlog=rows["disrupted"] + np.random.default_rng(0).normal(0, 0.3, len(rows))) for rows in parts
    ]
    p = BASELINES["logistic regression"](*leaking)
    auc = all_scores(leaking[2], {"leaking": p}, Cost())["leaking"]["overall"]["auc"]
    with pytest.raises(ModelError, match=r"leaking has AUC 0\.99\d on later flights, above 0\.80"):
        check_plausible_auc(auc, "leaking")


def test_a_score_that_is_not_defined_is_null(tmp_path):
    rows = table(200)
    rows["disrupted"] = np.where(rows["month"] == 7, 1, rows["disrupted"])
    write_scores(tmp_path / "scores.json", {"missed": 3}, all_scores(rows, {"coin": np.full(200, 0.3)}, Cost()))
    text = (tmp_path / "scores.json").read_text()
    assert "NaN" not in text
    written = json.loads(text)["models"]["coin"]["month"]
    assert written["7"]["auc"] is None and written["7"]["log_loss"] > 0 and written["8"]["auc"] == 0.5


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        ("June", "2013-07-01", "day has value 'June'; write it such as '2013-06-01'"),
        (2013, "2013-07-01", "day has value 2013; write"),
        (
            "2013-08-01",
            "2013-09-01",
            "from 2013-08-01 to before 2013-09-01; the table runs from 2013-06-01 to 2013-06-01",
        ),
        ("2013-07-01", "2013-06-01", "no flight is scheduled"),
    ],
)
def test_days_that_choose_nothing_are_named(start, end, words):
    rows = pd.DataFrame({"scheduled_departure": pd.to_datetime(["2013-06-01T12:00"])})
    with pytest.raises(ModelError, match=words):
        between(rows, start, end)


def test_days_are_those_of_new_york():
    rows = pd.DataFrame(
        {"scheduled_departure": pd.to_datetime(["2013-06-01T03:59", "2013-06-01T04:00", "2013-11-04T04:59"])}
    )
    assert between(rows, "2013-05-31", "2013-06-01").index.tolist() == [0]
    assert between(rows, "2013-11-03", "2013-11-04").index.tolist() == [2]  # an hour later since that day
