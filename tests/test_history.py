"""Metrics of any JSON file, and how runs differ."""

import json

import pytest
from pipeline_project import edit, finish, make, notebook, planner

from mlnb.pipelines.changes import in_words
from mlnb.pipelines.history import LIMIT, changed, metrics_of


@pytest.fixture
def product(tmp_path):
    def write(text, name="scores.json"):
        (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("document", "metrics"),
    [
        ({"auc": 0.5, "n": 3, "flag": True, "text": "x", "none": None, "list": [1, 2]}, {"auc": 0.5, "n": 3.0}),
        ({"a": {"b": {"c": 1}}, "z": 2}, {"z": 2.0, "a.b.c": 1.0}),
        ('{"a": NaN, "b": Infinity, "c": -Infinity, "d": 1}', {"a": None, "b": None, "c": None, "d": 1.0}),
        ('{"a": 1' + "0" * 400 + "}", {"a": None}),
        ([1, 2, 3], {}),
        ("7", {}),
        ({}, {}),
    ],
)
def test_numbers_by_dotted_names(product, document, metrics, caplog):
    assert metrics_of({"nb": product("", "nb.ipynb"), "scores": product(document)}) == metrics
    assert not caplog.records


@pytest.mark.parametrize("text", ["", "auc = 0.5", '{"auc": 0.5', "[" * 100_000, "\udcff"])
def test_what_is_no_json_is_said(tmp_path, text, caplog):
    (file := tmp_path / "m.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert metrics_of({"metrics": file}) == {}
    assert f"product 'metrics' ({file}) is no JSON document" in caplog.text and len(caplog.records) == 1


def test_a_file_that_is_missing_or_of_another_kind(tmp_path, product, caplog):
    assert metrics_of({"metrics": product("a,b\n1,2", "metrics.csv"), "data": product({"a": 1})}) == {}
    assert not caplog.records
    assert metrics_of({"metrics": tmp_path / "none.json"}) == {} and "no JSON document" in caplog.text


def test_details_go_before_the_whole_does(product):
    deep = {f"m{i}": {"auc": i} for i in range(300)} | {"auc": 0.5}
    found = metrics_of({"scores": product(deep)})
    assert len(found) == LIMIT and next(iter(found)) == "auc" and "m0.auc" in found and "m299.auc" not in found


def test_two_products(product):
    both = {"metrics": product({"auc": 1}, "m.json"), "scores": product({"auc": 2}, "s.json")}
    assert metrics_of(both) == {"metrics.auc": 1.0, "scores.auc": 2.0}


def _class(root, size):
    (root / "planes" / "work.py").write_text(f"class Planes:\n    size = {size}\n\n    def __len__(self):\n        return self.size\n")


def _library(old, new):
    return lambda root: edit(root / "planes" / "work.py", old, new)


ONE_WORDING = {
    "a class": (lambda root: _class(root, 2), ["class planes.work.Planes changed"]),
    "a class that is not used": (
        lambda root: notebook(root / "nbs" / "first.ipynb", PARAMETERS, "1"),
        ["class planes.work.Planes is not used any more", "its notebook changed"],
    ),
    "a parameter": (lambda root: (root / "env.yaml").write_text("n: [2, 3]\n"), ["parameter n changed from [1] to [2, 3]"]),
    "an input": (lambda root: (root / "in.csv").write_text("2"), ["input in.csv changed"]),
    "an input that is gone": (lambda root: (root / "in.csv").unlink(), ["input in.csv is gone"]),
    "an upstream task": (lambda root: (root / "out" / "other.ipynb").write_text("2"), ["output of other changed"]),
}  # fmt: skip
PARAMETERS = 'upstream = ["other"]\nproduct = None\nn = None'


@pytest.mark.parametrize(("change", "words"), ONE_WORDING.values(), ids=ONE_WORDING)
def test_a_change_has_one_wording_in_the_plan_and_between_runs(tmp_path, change, words):
    root = make(tmp_path / "project")
    _class(root, 1)
    notebook(root / "nbs" / "first.ipynb", PARAMETERS, "from planes.work import Planes\nlen(Planes())")
    edit(root / "pipeline.yaml", 'params: {n: "{{n}}"}', 'params: {n: "{{n}}"}\n    inputs: [in.csv]')
    (root / "env.yaml").write_text("n: [1]\n")
    (root / "in.csv").write_text("1")
    plan = planner(root)
    finish(plan, *plan.spec.tasks)
    before = plan.begin("first").made_from
    change(root)
    plan = planner(root)
    after = plan.begin("first").made_from
    assert in_words(before, after) == words
    assert list(plan.decide("first").reasons) == words


def test_what_is_not_known_is_not_compared():
    part = {"notebook": "0123abcd", "packages": {"torch": "2.8"}}
    assert in_words(None, part) == in_words(part, None) == in_words(part, part) == []
    assert in_words(part, {"notebook": "0123abcd"}) == ["torch is not imported any more, or not installed"]
    many = {"code": {f"planes.work.f{i}": ["function", "1"] for i in range(12)}}
    assert in_words({"code": {}, "notebook": None}, many)[-1] == "and 2 more changes of code"


def test_a_parameter_that_became_none_has_changed():
    assert changed({"a": None}, {}) == {"a": (None, None)} and changed({"a": 1}, {"a": 1}) == {}
