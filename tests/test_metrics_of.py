"""What a task measured: every number of any JSON file, under names that MLflow takes."""

import json

import pytest

from mlnb.models.registry import Tracking, log_pipeline_run
from mlnb.pipelines.task_metrics import mlflow_names, mlflow_notes, read_task_metrics
from mlnb.records import utc_now as now

ODD_NAMES = [
    "",
    " ",
    ".",
    "..",
    "../up",
    "/root",
    "a//b",
    "a/",
    "./a",
    "tab\tand\nline",
    "50 %",
    "x" * 300,
    "é/∆",
    "a\x00b",
    "a=b",
    "{c}",
]


@pytest.fixture
def product(tmp_path):
    def write(text, name="scores.json"):
        (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("document", "metrics"),
    [
        ({"auc": 0.5, "n": 3, "flag": True, "text": "x", "none": None, "list": ["a", "b"]}, {"auc": 0.5, "n": 3.0}),
        ({"a": {"b": {"c": 1}}, "z": 2}, {"z": 2.0, "a.b.c": 1.0}),
        ([1, 2, 3], {}),
        ("7", {}),
        ({}, {}),
    ],
)
def test_numbers_by_dotted_names(product, document, metrics, caplog):
    found = read_task_metrics({"nb": product("", "nb.ipynb"), "scores": product(document)})
    assert (found.values, found.notes) == (metrics, ()) and not caplog.records


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400])
def test_what_is_not_finite_is_said(product, value):
    found = read_task_metrics({"scores": product(f'{{"a": {value}, "d": 1}}')})
    assert found.values == {"a": None, "d": 1.0} and found.notes[0].startswith("the metrics 'a' are not finite")


@pytest.mark.parametrize("inner", [[0.8, 0.9], [{"auc": 1}], [[1]], ["x", 2]])
def test_numbers_in_lists_are_not_recorded_and_that_is_said(product, inner):
    found = read_task_metrics({"scores": product({"auc": 1, "folds": {"k" * 100: inner}})})
    assert found.values == {"auc": 1.0}
    assert found.notes == (f"numbers in the lists 'folds.{'k' * 51}...' are not recorded; give each number a name",)


@pytest.mark.parametrize("text", ["", "auc = 0.5", '{"auc": 0.5', "[" * 100_000, "\udcff"])
def test_what_is_no_json_is_said(tmp_path, text, caplog):
    (file := tmp_path / "m.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_task_metrics({"metrics": file}).values == {}
    assert f"product 'metrics' ({file}) is not a JSON document" in caplog.text and len(caplog.records) == 1


def test_a_file_that_is_missing_or_of_another_kind(tmp_path, product, caplog):
    assert read_task_metrics({"metrics": product("a,b\n1,2", "metrics.csv"), "data": product({"a": 1})}).values == {}
    assert not caplog.records
    assert read_task_metrics({"metrics": tmp_path / "none.json"}).values == {} and "not a JSON document" in caplog.text


def test_two_products(product):
    both = {"metrics": product({"auc": 1}, "m.json"), "scores": product({"auc": 2}, "s.json")}
    assert read_task_metrics(both).values == {"metrics.auc": 1.0, "scores.auc": 2.0}


def test_nothing_is_left_out_of_a_document_with_405_numbers(product):
    months = {f"{m}": {f"s{k}": m * k for k in range(33)} for m in range(12)}
    document = {"auc": 0.5, "months": months, "test": {f"t{k}": k for k in range(8)}}
    found = read_task_metrics({"scores": product(document)})
    assert len(found.values) == 405 and found.values["months.11.s32"] == 352 and not found.notes


def test_beyond_the_limit_the_user_chooses_and_what_is_left_out_is_said(product):
    document = {f"m{i}": i for i in range(300)} | {"test": {"auc": 0.5, "loss": 1.0}, "valid": {"auc": 0.6}}
    found = read_task_metrics({"scores": product(document)}, first=("test.auc", "*.auc"), limit=200)
    assert list(found.values)[:3] == ["test.auc", "valid.auc", "m0"] and len(found.values) == 200
    (note,) = found.notes
    assert note.startswith(
        "200 of 303 metrics are recorded, 'm198', 'm199', 'm200', 'm201', 'm202' and 98 more are not; raise"
    )


@pytest.mark.parametrize(
    ("document", "values", "said"),
    [
        ({"": 1, "a": 2}, {"_": 1.0, "a": 2.0}, "empty name"),
        ({"a": {"": 1, "b": 2}}, {"a._": 1.0, "a.b": 2.0}, "empty name"),
        ({"": {"": 1}, "_": {"_": 2}}, {"_._": 1.0, "_.__2": 2.0}, "several"),
        ({"a.b": 1, "a": {"b": 2}}, {"a.b": 1.0, "a.b_2": 2.0}, "several metrics have the name 'a.b'"),
        ({" a": 1, "a": 2, "a_2": 3}, {"a": 1.0, "a_2": 2.0, "a_2_2": 3.0}, "several"),
    ],
)
def test_a_name_that_is_empty_or_taken_loses_no_value(product, document, values, said):
    found = read_task_metrics({"scores": product(document)})
    assert found.values == values and any(said in note for note in found.notes)


def test_no_name_costs_mlflow_a_value(tmp_path):
    names = [*ODD_NAMES, "tab and line", "50 _", "_"]
    assert len(set(mlflow_names(names).values())) == len(names)
    odd = {"text": "much", "list": [1], "none": None, "true": True, "ok": 1}
    tasks = [
        {"name": "train", "status": "executed", "seconds": 1.0, "notebook": None, "metrics": dict.fromkeys(names, 0.5)},
        {"name": "odd task %", "status": "executed", "seconds": 2.0, "metrics": odd},
    ]
    run = {
        "id": "20260301T120000-ab12cd",
        "pipeline": "a project/../x",
        "status": "succeeded",
        "started": now(),
        "ended": now(),
    }
    run["parameters"] = {name: name for name in names} | {"long": "x" * 9000, "none": None, "deep": {"a": [1]}}
    run_id = log_pipeline_run(url := f"sqlite:///{tmp_path}/mlflow.db", run, tasks)
    kept = Tracking(url).client.get_run(run_id)
    of_train = [value for name, value in kept.data.metrics.items() if name.startswith("train/")]
    assert kept.info.status == "FINISHED" and of_train.count(0.5) == len(names)
    assert kept.data.metrics["odd task _/ok"] == 1 and "odd task _/text" not in kept.data.metrics
    assert len(kept.data.params) == len(run["parameters"]) and len(kept.data.params["long"]) == 6000
    assert [p.name for p in (tmp_path / "mlruns").iterdir()] in ([], ["a project___x"])


def test_what_mlflow_has_otherwise_is_said_beforehand():
    assert mlflow_notes(["auc", "train/loss"], {"seed": 1, "text": "x" * 6000}) == []
    assert mlflow_notes(["a*b"], {"ok": 1, "c?": 1, "long": "x" * 6001}) == [
        "MLflow does not allow the name of a metric: it stores 'a*b' as 'a_b'",
        "MLflow does not allow the name of a parameter: it stores 'c?' as 'c_'",
        "MLflow stores the first 6000 characters of the parameters 'long'",
    ]
