"""Labels of every kind of problem: sent to a service, added from files, stored, read back and compared."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlnb.data.fields import Field
from mlnb.models.binary import Binary
from mlnb.models.custom import Custom
from mlnb.models.multiclass import Multiclass
from mlnb.models.regression import Regression
from mlnb.monitoring.labels import import_labels
from mlnb.monitoring.performance import measure_performance
from mlnb.monitoring.performance_page import page
from mlnb.project.errors import ServingError
from mlnb.serving.labels import LabelDecoder, LabelLog, LabelStore, compact_labels, current_labels, label_values
from mlnb.serving.row_validation import RequestError

FORECAST = Field("value", "vector", "Sales of two days", [1.0, 2.0], shape=(2,))
KINDS = {
    "binary": (Binary(), [1, 0, True], [2, 0.5, "yes", None, float("inf")]),
    "multiclass": (Multiclass(classes=("a", "b", "3")), ["a", "3", "b"], ["c", "", None, 1.5, "A"]),
    "regression": (Regression(), [7, -0.5, 1e9], [float("inf"), float("nan"), None, "dear"]),
    "custom": (Custom(fields=(FORECAST,), label_field=FORECAST), [[1, 2], [0, 0.5]], [[1], "x", None]),
}
KIND = pytest.mark.parametrize("kind", KINDS)
ROWS, START = 400, np.datetime64("2026-03-02T00:00")


def as_utc(times):
    return pa.array(np.asarray(times).astype("datetime64[us]")).cast(pa.timestamp("us", "UTC"))


def store_in(folder):
    return LabelStore(folder / "lines", str(folder / "parts"))


@KIND
def test_what_is_sent_is_what_is_compared_and_the_wrong_one_is_named(kind, tmp_path):
    problem, good, bad = KINDS[kind]
    decoder, log = LabelDecoder(problem.label), LabelLog(tmp_path / "lines")
    log.append(decoder.labels(json.dumps([{"entity": f"e{i}", "value": v} for i, v in enumerate(good)]).encode()))
    log.close()
    store = store_in(tmp_path)
    for _ in range(2):  # as lines, as Parquet
        values, is_label = label_values(current_labels(store.read()).sort_by("entity"), problem.label)
        assert is_label.all() and problem.parse_labels(values).tolist() == good
        compact_labels(store)
    for value in bad:
        with pytest.raises(RequestError) as error:
            decoder.labels(json.dumps([{"entity": "a", "value": good[0]}, {"entity": "b", "value": value}]).encode())
        assert error.value.fields == [] or [(p["row"], p["field"]) for p in error.value.fields] == [(1, "value")]


@KIND
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_good_rows_of_a_file_are_stored_and_the_others_quarantined(kind, ending, tmp_path):
    problem, good, bad = KINDS[kind]
    bad = [value for value in bad if ending == ".csv" or not isinstance(value, str) or kind == "multiclass"]
    values = pd.Series([*good, *bad], dtype=object)
    if ending == ".parquet" and kind == "multiclass":
        values = values.map(str, na_action="ignore")
    elif ending == ".parquet" and kind != "custom":
        values = values.astype(float)
    elif ending == ".csv":
        values = values.map(lambda v: json.dumps(v) if isinstance(v, list) else v)
    file = tmp_path / f"labels{ending}"
    frame = pd.DataFrame({"request_id": [f"r{i}" for i in range(len(values))], "value": values})
    frame.to_csv(file, index=False) if ending == ".csv" else frame.to_parquet(file)
    store, none = store_in(tmp_path), pa.table({"entity": pa.array([], "string"), "time": as_utc([])})
    result = import_labels(file, store, none, label=problem.label)
    assert (result.added, result.rejected) == (len(good), len(bad))
    assert f"row {len(good)}, field 'value': " in result.problem and "; write " in result.problem
    assert import_labels(file, store, none, label=problem.label).added == 0  # without a time: nothing has changed
    table = current_labels(store.read()).sort_by("entity")
    assert problem.parse_labels(label_values(table, problem.label)[0]).tolist() == good


def test_a_file_without_times_corrects_what_is_stored_and_may_be_older_than_the_answers(tmp_path):
    store, asked = store_in(tmp_path), pa.table({"entity": ["a"], "time": as_utc([np.datetime64("now")])})
    (tmp_path / "old.csv").write_text("entity,value\na,1\n")
    (tmp_path / "new.csv").write_text("entity,value\na,0\n")
    for name, value in (("old.csv", 1), ("new.csv", 0), ("old.csv", 1)):
        assert import_labels(tmp_path / name, store, asked).added == 1
        assert current_labels(store.read())["value"].to_pylist() == [value]


def test_whole_numbers_name_classes_and_a_column_of_another_type_is_refused_at_once(tmp_path):
    store, none = store_in(tmp_path), pa.table({"entity": pa.array([], "string"), "time": as_utc([])})
    digits = Multiclass(classes=tuple("0123456789"))
    for name, values in (("ints", [3, 9]), ("floats", [3.0, 9.0]), ("texts", ["3", "9"])):
        pd.DataFrame({"entity": ["a", "b"], "value": values}).to_parquet(file := tmp_path / f"{name}.parquet")
        assert import_labels(file, store, none, label=digits.label).rejected == 0
    assert current_labels(store.read())["text"].to_pylist() == ["3", "9"]
    with pytest.raises(RequestError) as error:
        LabelDecoder(digits.label).labels(b'{"entity": "a", "value": 3}')
    assert error.value.fields[0]["problem"].endswith('names of classes are text: "3"')
    with pytest.raises(ServingError, match=r"column 'value' has type .*; write it as numbers"):
        import_labels(file, store, none, label=Regression().label)


def test_labels_of_releases_that_knew_only_numbers_are_read(tmp_path):
    store = store_in(tmp_path)
    old = pa.table({"entity": ["a"], "value": [1.0], "observed_at": as_utc([START]), "received_at": as_utc([START]),
                    "source": ["x"]})  # fmt: skip
    store.part_store.write_table(f"{store.part_store.folder}/old.parquet", old)
    (tmp_path / "lines").mkdir()
    line = '{"entity": "b", "value": 0, "observed_at": "2026-03-02T00:00:00Z", "received_at": "2026-03-02T00:00:00Z", '
    (tmp_path / "lines" / "1.jsonl").write_text(line + '"source": "service"}\n')
    assert sorted(current_labels(store.read())["value"].to_pylist()) == [0, 1]


def answers(problem, rng, n=ROWS):
    "Answers of a problem, and labels that are near them"
    if isinstance(problem, Binary):
        p = rng.beta(2, 4, n)
        return {"probability": p, "decision": p >= 0.4}, (rng.random(n) < p) * 1.0
    if isinstance(problem, Multiclass):
        p = rng.dirichlet((1, 1, 1), n)
        labels = np.array(problem.classes)[[rng.choice(3, p=row) for row in p]]
        return problem.outputs(p, None, "test"), labels
    if isinstance(problem, Regression):
        prediction = rng.gamma(3, 10, n)
        return {"prediction": prediction}, prediction + rng.normal(0, 2, n)
    sales = rng.gamma(3, 10, (n, 2))
    return {"value": sales}, sales + 1


def tables(outputs, labels):
    "The tables of decisions and of labels"
    n = len(labels)
    times, keys = START + np.arange(n) * np.timedelta64(1, "h"), [f"e{i}" for i in range(n)]
    columns = {name: list(c) if c.ndim > 1 else c for name, c in outputs.items()}
    same = {"model_version": ["v1"] * n, "arm": ["champion"] * n, "entity": keys}
    asked = pa.table(columns | same | {"time": as_utc(times), "logged_at": as_utc(times)})
    is_text = labels.dtype.kind == "U" or labels.ndim > 1
    texts = [json.dumps(row) for row in labels.tolist()] if labels.ndim > 1 else labels
    known = as_utc(times + np.timedelta64(5, "h"))
    value = {"value": labels, "text": pa.nulls(n, "string")}
    value = {"value": pa.nulls(n, pa.float64()), "text": texts} if is_text else value
    return asked, pa.table({"entity": keys, "observed_at": known, "received_at": known, "source": ["x"] * n} | value)


@KIND
def test_performance_is_that_of_the_problem(kind):
    problem, rng = KINDS[kind][0], np.random.default_rng(0)
    outputs, labels = answers(problem, rng)
    asked, told = tables(outputs, labels)
    found = measure_performance(asked, told, problem, 24, np.datetime64("2026-06-01"))
    assert found.overall.realised == pytest.approx(problem.realised(labels, outputs), rel=1e-9)
    assert set(found.overall.interval) == set(found.overall.realised) and found.overall.coverage == 1
    document, html = json.loads(json.dumps(found.to_dict())), page(found, "headline")
    assert document["problem"] == kind and "://" not in html
    assert html.count("<figure>") == {"binary": 1, "multiclass": 3, "regression": 2, "custom": 0}[kind]
    assert not found.is_worse_than_constant


@KIND
@pytest.mark.parametrize("case", ["no labels", "of another model", "3 rows", "one value", "not closed"])
def test_what_is_missing_is_no_error(kind, case):
    problem, rng = KINDS[kind][0], np.random.default_rng(0)
    outputs, labels = answers(problem, rng)
    asked, told = tables(outputs, np.repeat(labels[:1], ROWS, axis=0) if case == "one value" else labels)
    told = told.slice(0, 0) if case == "no labels" else told
    asked = asked.slice(0, 3) if case == "3 rows" else asked
    if case == "of another model":
        other = tables(*answers(KINDS["regression" if kind == "multiclass" else "multiclass"][0], rng))[1]
        told = other.set_column(other.column_names.index("value"), "value", pa.array(np.full(ROWS, 7.5)))
        told = told if kind == "multiclass" else other
    as_of = np.datetime64("2026-03-02T12:00" if case == "not closed" else "2026-06-01")
    found = measure_performance(asked, told, problem, 24, as_of)
    assert (found.overall.realised is None) == (case in ("no labels", "of another model", "not closed"))
    assert found.invalid_labels == (ROWS if case == "of another model" else 0)
    assert page(found, "headline") and json.dumps(found.to_dict())
