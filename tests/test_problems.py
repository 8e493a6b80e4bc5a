"""Problems: what a hook may return, what a label may be, and metrics that agree with scikit-learn's."""

import sys

import msgspec
import numpy as np
import pytest
from sklearn import metrics

from mlnb.data.fields import Field
from mlnb.models.binary import Binary, cost_objective
from mlnb.models.custom import Custom
from mlnb.models.metrics import Cost
from mlnb.models.multiclass import Multiclass
from mlnb.models.problems import Objective, problem_class, problem_of
from mlnb.models.regression import Regression
from mlnb.project.errors import BundleError, ModelError

CLASSES = ("9", "0", "zebra", "ant")  # in an order that is not that of the alphabet
PROBLEMS = [
    Binary(),
    Multiclass(CLASSES),
    Regression(),
    Regression(interval=0.9, unit="EUR"),
    Custom((Field("minutes", "number", "", 1.0), Field("vehicle", "string", "", "van"))),
]
SHAPES = {"binary": (3,), "multiclass": (3, 4), "regression": (3,)}


def kind(problem):
    return msgspec.to_builtins(problem)["kind"]


@pytest.mark.parametrize("problem", PROBLEMS, ids=kind)
def test_a_problem_is_read_back_as_it_was_written(problem):
    assert problem_of(msgspec.json.decode(msgspec.json.encode(problem))) == problem


@pytest.mark.parametrize("problem", PROBLEMS[:3], ids=kind)
@pytest.mark.parametrize(
    "values",
    [
        None, "text", 0.5, [0.5], np.full((3, 2), 0.5), np.full((2,), 0.5), np.full((3, 4, 1), 0.5),
        np.full((3,), "0.5"),
        np.full((3, 4), "0.5"), np.full((3, 4), 0.5, object), np.full((3,), 0.5 + 0j), {"p": [0.5]},
    ],
)  # fmt: skip
def test_a_hook_that_returns_something_else(problem, values):
    with pytest.raises(BundleError, match=r"shop.Model: \w+ has (shape|dtype) .*; give "):
        problem.check_prediction(values, 3, "shop.Model", 9)


@pytest.mark.parametrize("problem", PROBLEMS[:3], ids=kind)
@pytest.mark.parametrize("give", [np.float32, np.int8, np.bool_])
def test_numbers_of_any_type(problem, give):
    values = np.zeros(SHAPES[kind(problem)], give)
    assert problem.check_prediction(values, 3, "shop.Model", 9).dtype == np.float64


@pytest.mark.parametrize(
    ("problem", "prediction"),
    [
        (Binary(), [0.5, 1.1, 0.5]),
        (Binary(), [0.5, np.nan, 0.5]),
        (Multiclass(("a", "b")), [[0.5, 0.5], [0.5, 0.6], [1, 0]]),
        (Multiclass(("a", "b")), [[0.5, 0.5], [1.5, -0.5], [1, 0]]),
        (Multiclass(("a", "b")), [[0.5, 0.5], [np.nan, 1], [1, 0]]),
        (Regression(), [0, np.inf, 0]),
        (Regression(interval=0.8), [[1, 0, 2], [1, 2, 0], [1, 1, 1]]),
        (Regression(interval=0.8), [[1, 0, 2], [1, -np.inf, 2], [1, 1, 1]]),
        (Regression(interval=0.8), [[1, 0, 2], [np.nan, 0, 2], [1, 1, 1]]),
    ],
)
def test_rows_that_cannot_be_answered(problem, prediction):
    checked = problem.check_prediction(np.array(prediction, float), 3, "shop.Model", 9)
    outputs = problem.outputs(checked, lambda p: p > 0.5, "shop.Model")
    assert tuple(outputs) == tuple(field.name for field in problem.output)
    assert problem.invalid(outputs).tolist() == [False, True, False] and not problem.are_valid(outputs)


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        (Binary(), [0, 1, 2], "1 of 3 labels are neither 0 nor 1"),
        (
            Multiclass(CLASSES),
            ["ant", "Zebra"],
            r"row 1 of labels is 'Zebra' \(did you mean 'zebra'\?\); classes are 9, 0",
        ),
        (Multiclass(CLASSES), [0, 9, None], "row 2 of labels is None"),
        (Regression(), [1.0, -np.inf], "row 1 of labels is -inf; give finite numbers"),
        (Regression(), [1.0, None], "row 1 of labels is nan"),
        (Regression(), ["dear"], "labels are not numbers"),
        (PROBLEMS[-1], [1.0], "has no labels"),
    ],
)
def test_labels_of_another_kind(problem, labels, message):
    with pytest.raises(ModelError, match=message):
        problem.parse_labels(labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [4, 500])
def test_multiclass_metrics_are_those_of_scikit_learn(seed, rows):
    rng, problem, classes = np.random.default_rng(seed), Multiclass(CLASSES), np.array(CLASSES)
    p = rng.dirichlet(np.ones(4), rows)
    p[: rows // 2] = np.round(p[: rows // 2], 0) / np.maximum(np.round(p[: rows // 2], 0).sum(1, keepdims=True), 1)
    p[p.sum(1) == 0] = 0.25  # ties
    p /= p.sum(1, keepdims=True)
    labels = classes[rng.integers(0, 3, rows)]  # no ant
    outputs = problem.outputs(p, None, "")
    realised, order = problem.realised(labels, outputs), np.argsort(classes)
    predicted, ranked = outputs["prediction"], np.argsort(-p[:, :], axis=1)[:, :1]
    assert (predicted == classes[ranked[:, 0]]).mean() > 0.5
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro", zero_division=0),
        "log_loss": metrics.log_loss(labels, p[:, order], labels=classes[order]),
    }
    with pytest.warns() if not set(predicted) <= set(labels) else np.errstate():
        expected["balanced_accuracy"] = metrics.balanced_accuracy_score(labels, predicted)
    assert {name: realised[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("offset", [0, 1e6, -3e9])
def test_regression_metrics_are_those_of_scikit_learn(offset):
    rng, problem = np.random.default_rng(1), Regression(interval=0.5)
    labels = offset + rng.normal(size=999)
    prediction = labels + rng.normal(size=999)
    outputs = {"prediction": prediction, "lower": prediction - 0.7, "upper": prediction + 0.7}
    realised = problem.realised(labels, outputs)
    pinball = [
        metrics.mean_pinball_loss(labels, outputs[end], alpha=q) for end, q in (("lower", 0.25), ("upper", 0.75))
    ]
    assert realised == pytest.approx(
        {
            "mae": metrics.mean_absolute_error(labels, prediction),
            "rmse": metrics.root_mean_squared_error(labels, prediction),
            "r2": metrics.r2_score(labels, prediction),
            "wape": np.abs(labels - prediction).sum() / np.abs(labels).sum(),
            "bias": (prediction - labels).mean(),
            "pinball": np.mean(pinball),
            "interval_coverage": (np.abs(labels - prediction) <= 0.7).mean(),
        },
        rel=1e-12,
    )


def test_labels_that_are_all_equal():
    same = np.full(5, 3.0)
    assert Regression().realised(same, {"prediction": same + 1})["r2"] == metrics.r2_score(same, same + 1) == 0
    assert Regression().realised(same, {"prediction": same})["r2"] == metrics.r2_score(same, same) == 1


def test_an_expected_cost_weighs_both_labels():
    outputs = {"probability": np.array([0.2, 0.8]), "decision": np.array([False, True])}
    assert Binary().expected(outputs, cost_objective(Cost(1, 3)))["cost_per_1000"] == pytest.approx(
        1000 * (0.6 + 1) / 2
    )
    own = Objective(lambda labels, outputs: np.where(labels == "ant", 5, 0.0), "EUR")
    answers = {
        "prediction": np.array(["9"]),
        "probability": np.array([0.7]),
        "probabilities": np.array([[0.7, 0, 0.1, 0.2]]),
    }
    assert Multiclass(CLASSES).expected(answers, own)["cost_per_1000"] == pytest.approx(1000)


def test_intervals_need_days_and_cover_what_was_realised():
    rng, problem = np.random.default_rng(2), Regression()
    labels = rng.normal(size=3000)
    outputs = {"prediction": labels + rng.normal(size=3000)}
    assert problem.intervals(np.arange(3000) // 1000, labels, outputs) == {}
    realised, intervals = problem.realised(labels, outputs), problem.intervals(np.arange(3000) // 100, labels, outputs)
    assert set(intervals) == set(realised)
    assert all(low <= realised[name] <= high for name, (low, high) in intervals.items())


# Kinds of other packages


@pytest.fixture
def ranking(tmp_path, monkeypatch):
    "An installed package with a problem of its own"
    (tmp_path / "shop_ranking.py").write_text(
        "from mlnb.models.custom import Custom\n\n\nclass Ranking(Custom, frozen=True, tag='ranking'):\n    pass\n"
    )
    info = tmp_path / "shop_ranking-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop-ranking\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mlnb.problems]\nranking = shop_ranking:Ranking\nbinary = shop_ranking:Ranking\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("shop_ranking", None)


def test_a_problem_of_a_trusted_package(ranking):
    with pytest.raises(
        BundleError, match="problem 'ranking' comes from shop_ranking, which is not trusted; name its package"
    ):
        problem_class("ranking")
    assert "shop_ranking" not in sys.modules
    value = {"kind": "ranking", "fields": [{"name": "rank", "type": "integer", "description": "", "example": 1}]}
    assert problem_of(value, lambda module: module == "shop_ranking").output[0].name == "rank"
    assert problem_class("binary", lambda module: True) is Binary


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "problem 'None' is not known"),
        ({"kind": ["binary"]}, "is not known"),
        ({"kind": "regresion"}, r"did you mean 'regression'\?"),
        ({"kind": "regression", "interval": 1.5}, "Expected `float` < 1.0 - at `\\$.interval`"),
        ({"kind": "multiclass", "classes": ["a"]}, "length >= 2"),
        ({"kind": "multiclass", "classes": ["a", "a"]}, "name each class once"),
        ({"kind": "binary", "classes": []}, "unknown field `classes`"),
        (
            {"kind": "custom", "fields": [{"name": "x", "type": "y", "description": "", "example": 1}]},
            "write one of number",
        ),
    ],
)
def test_a_problem_that_cannot_be_read(value, message):
    with pytest.raises(BundleError, match=message):
        problem_of(value)
