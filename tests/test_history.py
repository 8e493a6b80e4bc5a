"""Metrics of any JSON file, and how runs differ."""

import json

import pytest

from mlnb.pipelines.history import LIMIT, changed, in_words, metrics_of


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


def test_differences_in_words():
    assert in_words(None, {"notebook": "aa"}) == in_words({"notebook": "aa"}, None) == in_words({"a": "1"}, {"a": "1"}) == []
    flat = in_words({"notebook": "0123abcd", "f.g": "0123abcd", "gone": "1"}, {"notebook": "9123abcd", "f.g": "0123abcd", "seed": "2"})
    assert flat == ["gone is gone", "notebook changed", "seed is new"]
    deep = in_words({"parameters": {"seed": 1}, "packages": {"torch": "2.8"}}, {"parameters": {"seed": 2}, "packages": {"torch": "2.9"}})
    assert deep == ["package torch 2.8 → 2.9", "parameter seed 1 → 2"]


def test_a_parameter_that_became_none_has_changed():
    assert changed({"a": None}, {}) == {"a": (None, None)} and changed({"a": 1}, {"a": 1}) == {}
