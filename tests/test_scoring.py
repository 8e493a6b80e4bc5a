import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import toy_project

from mlnb.data.fields import DECISION_TIME, columns_of
from mlnb.data.snapshot_store import SnapshotStore
from mlnb.models.bundle import Bundle
from mlnb.project.errors import MlnbError, ServingError
from mlnb.serving import scoring, table_files
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.predictions import PredictionLog
from mlnb.serving.row_validation import RequestError, RequestSchema

TIMES = ("departure", "decision_time")


@pytest.fixture(scope="module")
def model(toy):
    return Bundle.load(toy / "products/bundle")


@pytest.fixture(scope="module")
def newest(toy):
    return SnapshotStore(str(toy / ".mlnb/storage/context")).newest


@pytest.fixture(scope="module")
def rows(model):
    "The sample requests of the toy bundle, as JSON objects"
    return model.samples["requests"]


@pytest.fixture
def small(monkeypatch):
    "Batches of at most 5 rows, so that a few rows are many batches"
    monkeypatch.setattr(table_files, "MAX_BATCH_ROWS", 5)


def parquet(path, rows):
    "Write JSON objects as a Parquet file with typed columns"
    table = pa.Table.from_pylist(rows)
    for name in [name for name in TIMES if name in table.schema.names]:
        column = table[name].cast(pa.timestamp("us", "UTC"))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, path)
    return path


def text(path, rows):
    "Write JSON objects as a CSV file"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def many(rows, n):
    return [rows[i % len(rows)] | {"note": f"row {i}"} for i in range(n)]


WRITE = {".parquet": parquet, ".csv": text}


def table_of(path):
    return pq.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)


@pytest.mark.parametrize("kind", [".parquet", ".csv"])
@pytest.mark.parametrize("target", [".parquet", ".csv"])
def test_rows_are_answered_to_the_bit(model, newest, rows, tmp_path, small, kind, target):
    source, output = WRITE[kind](tmp_path / f"in{kind}", many(rows, 30)), tmp_path / f"out{target}"
    done = scoring.score(source, output, model, newest, 60)
    found = table_of(output)
    assert (done.rows, done.rejected, done.done) == (30, 0, 1.0)
    assert found["probability"].to_pylist() == [model.samples["outputs"]["probability"][i % 12] for i in range(30)]
    assert found["decision"].to_pylist() == [model.samples["outputs"]["decision"][i % 12] for i in range(30)]
    assert found["note"].to_pylist() == [f"row {i}" for i in range(30)] and set(found["model_version"].to_pylist()) == {
        "v1"
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, output.name])


def test_one_moment_for_all_rows(model, newest, rows, tmp_path):
    plain = [{name: value for name, value in row.items() if name != DECISION_TIME.name} for row in rows]
    at = np.datetime64("2013-07-01T04:10:00")
    scoring.score(parquet(tmp_path / "in.parquet", plain), tmp_path / "out.parquet", model, newest, 60, at)
    found = pq.read_table(tmp_path / "out.parquet")
    request = columns_of(model.request, plain)
    expected = model.predict(model.features(request, newest(at).lookup(request)))
    assert found["probability"].to_pylist() == expected.tolist()
    assert set(found["context_moment"].cast(pa.string()).to_pylist()) == {"2013-07-01 04:00:00.000Z"}
    with pytest.raises(ServingError, match="you cannot pass another decision time"):
        scoring.score(parquet(tmp_path / "in.parquet", rows), tmp_path / "out2.parquet", model, newest, 60, at)


WRONG = {
    "carrier": ["", "a" * 101, "escape\x1bhere", "bell\x07"],
    "flight": ["12.0", "1e3", "x", str(2**53 + 1), "9" * 30, "True"],
    "distance": ["NaN", "Infinity", "-inf", "1e999", "far", "1,5", "0x10"],
    "departure": [
        "2013-07-01T05:15:00",
        "2013-02-30T05:15:00Z",
        "1.7.2013",
        "1899-07-01T05:15:00Z",
        "2200-01-01T00:00:00Z",
        "25:00",
    ],
}


def test_csv_is_judged_as_a_request_is(model, newest, rows, tmp_path, small):
    "What is set aside is what the service refuses, and the sentences name the same fields"
    bad = [row | {name: value} for row in rows[:1] for name, values in WRONG.items() for value in values]
    source = text(tmp_path / "in.csv", [x for one in bad for x in (one, rows[1])])
    done = scoring.score(source, tmp_path / "out.csv", model, newest, 60)
    explained = table_of(tmp_path / "out.rejected.csv").to_pylist()
    assert done.rejected == len(bad) and [line["row"] for line in explained] == list(range(0, 2 * len(bad), 2))
    assert [line["field"] for line in explained] == [name for name, values in WRONG.items() for _ in values]
    schema = RequestSchema(model.request)
    for row, line in zip(bad, explained, strict=True):
        typed = row | {name: _number(row[name]) for name in ("flight", "distance")}
        with pytest.raises(RequestError) as refused:
            schema.decode(json.dumps(typed).encode())
        assert [f["field"] for f in refused.value.fields] == [line["field"]] and refused.value.fields[0][
            "expected"
        ] == line["expected"]


def _number(value):
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_typed_values_are_judged_as_a_request_is(model, newest, rows, tmp_path):
    table = pq.read_table(parquet(tmp_path / "in.parquet", many(rows, 12))).to_pydict()
    table["flight"][1] = 2**53 + 1
    table["distance"][2], table["distance"][3] = float("nan"), None
    table["carrier"][3], table["carrier"][4] = "", None
    table["departure"][5] = table["departure"][5].replace(year=2999)
    table["decision_time"][6] = None
    columns = {
        name: pa.array(values, pa.timestamp("us", "UTC")) if name in TIMES else values for name, values in table.items()
    }
    columns["origin"] = pa.array(table["origin"]).dictionary_encode()
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    done = scoring.score(tmp_path / "in.parquet", tmp_path / "out.parquet", model, newest, 60)
    explained = pq.read_table(tmp_path / "out.rejected.parquet").to_pylist()
    assert [(line["row"], line["field"]) for line in explained] == [
        (1, "flight"), (2, "distance"), (3, "carrier"), (3, "distance"), (4, "carrier"), (5, "departure"),
        (6, "decision_time"),
    ]  # fmt: skip
    assert explained[3]["problem"] == "is missing" and explained[1]["problem"] == "NaN is not a finite number"
    assert "is not between the years 1900 and 2200" in explained[5]["problem"]
    assert done.rejected == 6 and pq.read_table(tmp_path / "out.parquet")["note"].to_pylist() == [
        f"row {i}" for i in (0, 7, 8, 9, 10, 11)
    ]


def test_lines_that_are_no_rows(model, newest, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "MAX_BATCH_BYTES", 4 * 600)
    source = text(tmp_path / "in.csv", many(rows, 40))
    lines = source.read_text().splitlines()
    for at in (1, 2, 21, 40):
        lines[at] += ",too much"
    source.write_text("\n".join([*lines[:10], "", *lines[10:]]) + "\n")
    done = scoring.score(source, tmp_path / "out.parquet", model, newest, 60)
    explained = pq.read_table(tmp_path / "out.rejected.parquet").to_pylist()
    assert [line["row"] for line in explained] == [0, 1, 20, 39] and done.rejected == 4 and done.rows == 40
    assert explained[0]["problem"] == "the line has 8 values, the header has 7"
    assert pq.read_table(tmp_path / "out.parquet")["note"].to_pylist() == [
        f"row {i}" for i in range(40) if i not in (0, 1, 20, 39)
    ]


def test_rows_without_a_context(model, newest, rows, tmp_path):
    late = [
        rows[0],
        rows[0] | {"decision_time": "2013-06-01T00:00:00Z"},
        rows[1] | {"decision_time": "2013-07-02T00:00:00Z"},
        rows[1],
    ]
    done = scoring.score(parquet(tmp_path / "in.parquet", late), tmp_path / "out.parquet", model, newest, 60)
    explained = pq.read_table(tmp_path / "out.rejected.parquet").to_pylist()
    assert (
        done.rejected == 2
        and [line["row"] for line in explained] == [1, 2]
        and explained[0]["field"] == "decision_time"
    )
    assert (
        "no context is known at 2013-06-01" in explained[0]["problem"] and "is 14 hours old" in explained[1]["problem"]
    )
    probability = pq.read_table(tmp_path / "out.parquet")["probability"].to_pylist()
    assert probability == model.samples["outputs"]["probability"][:2]


@dataclass(frozen=True)
class Fails:
    "A bundle whose model fails with a flight of the number 103, in one way or another"

    bundle: Bundle
    how: type | None  # what is raised, by the model or for its features; None: nothing, there is no number

    def __getattr__(self, name):
        return getattr(self.bundle, name)

    def features(self, request, point_in_time):
        if self.how is TypeError and 103 in request["flight"]:
            raise TypeError("flight 103 has no features")
        return self.bundle.features(request, point_in_time) | {"flight": request["flight"]}

    def predict(self, features):
        found, wrong = self.bundle.predict(features), features["flight"] == 103
        if self.how is ValueError and wrong.any():
            raise ValueError("flight 103 is unknown")
        return np.where(wrong, np.nan, found)

    def outputs(self, features):
        return self.bundle.problem.outputs(self.predict(features), self.bundle.model.decide, "")


@pytest.mark.parametrize("how", [ValueError, TypeError, None])
def test_rows_that_the_model_fails_on_leave_the_others(model, newest, rows, tmp_path, small, how):
    source, output = parquet(tmp_path / "in.parquet", many(rows, 40)), tmp_path / "out.parquet"
    log = PredictionLog(tmp_path / "log")
    done = scoring.score(source, output, Fails(model, how), newest, 60, log=log)
    why = f"the model raised {how.__name__}" if how else "the model gave no valid answer"
    assert (done.rows, done.rejected, done.problem) == (40, 4, f"row 3: {why}")
    explained = pq.read_table(scoring.rejected_file(output)).to_pylist()
    assert explained == [
        {"row": row, "field": None, "problem": why, "expected": "a probability from 0 to 1"} for row in (3, 15, 27, 39)
    ]
    answered = [i for i in range(40) if i % 12 != 3]
    expected = model.samples["outputs"]["probability"]
    assert pq.read_table(output)["probability"].to_pylist() == [expected[i % 12] for i in answered]
    assert pq.read_table(output)["note"].to_pylist() == [f"row {i}" for i in answered]
    assert sorted(read_predictions(tmp_path / "log")["request_id"].str.rpartition("-")[2].astype(int)) == answered


def test_a_model_that_answers_nothing(model, newest, rows, tmp_path):
    broken = Fails(model, ValueError)
    source = parquet(tmp_path / "in.parquet", [row | {"flight": 103} for row in rows])
    assert scoring.score(source, tmp_path / "out.parquet", broken, newest, 60).rejected == 12
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 0


def test_strict_writes_nothing(model, newest, rows, tmp_path, small):
    source = parquet(tmp_path / "in.parquet", [*many(rows, 8), many(rows, 1)[0] | {"distance": None}])
    with pytest.raises(ServingError, match="row 8, field 'distance': is missing; nothing was written"):
        scoring.score(source, tmp_path / "out.parquet", model, newest, 60, strict=True)
    assert not (tmp_path / "out.parquet").exists()
    assert scoring.score(source, tmp_path / "out.parquet", model, newest, 60).resumed_rows == 9


def test_an_old_explanation_does_not_stay(model, newest, rows, tmp_path):
    source, output = parquet(tmp_path / "in.parquet", [rows[0] | {"carrier": ""}]), tmp_path / "out.parquet"
    scoring.score(source, output, model, newest, 60)
    assert pq.read_metadata(output).num_rows == 0 and scoring.rejected_file(output).is_file()
    parquet(source, rows)
    scoring.score(source, output, model, newest, 60, overwrite=True)
    assert pq.read_metadata(output).num_rows == 12 and not scoring.rejected_file(output).exists()


def test_nothing_of_anybody_is_replaced_unasked(model, newest, rows, tmp_path):
    source = text(tmp_path / "july.rejected.csv", many(rows, 12))
    kept = source.read_bytes()
    (tmp_path / "link.csv").symlink_to(source)
    for output in ("july.csv", "july.rejected.csv", "link.csv"):
        with pytest.raises(ServingError, match="would be replaced by a file of"):
            scoring.score(source, tmp_path / output, model, newest, 60, overwrite=True)
    assert source.read_bytes() == kept
    theirs = scoring.rejected_file(output := tmp_path / "out.parquet")
    theirs.write_text("somebody's")
    with pytest.raises(ServingError, match=f"{theirs.name} exists already; .* --overwrite"):
        scoring.score(source, output, model, newest, 60)
    assert theirs.read_text() == "somebody's" and not output.exists()
    scoring.score(source, output, model, newest, 60, overwrite=True)
    assert not theirs.exists() and pq.read_metadata(output).num_rows == 12


def test_a_run_that_ends_between_its_two_files_goes_on(model, newest, rows, tmp_path, monkeypatch):
    source, output = parquet(tmp_path / "in.parquet", [*rows, rows[0] | {"carrier": ""}]), tmp_path / "out.parquet"
    whole = scoring.write_output
    monkeypatch.setattr(
        scoring, "write_output", lambda *a: whole(*a) if a[2] != output else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        scoring.score(source, output, model, newest, 60)
    monkeypatch.undo()
    assert scoring.rejected_file(output).is_file() and not output.exists()
    assert scoring.score(source, output, model, newest, 60).resumed_rows == 13
    assert pq.read_metadata(output).num_rows == 12 and len(list(tmp_path.iterdir())) == 3


def test_what_cannot_work_is_said_before_the_first_row(model, newest, rows, tmp_path):
    def refused(source, *words, output="out.parquet"):
        with pytest.raises(MlnbError) as e:
            scoring.score(source, tmp_path / output, model, newest, 60)
        assert all(word in str(e.value) for word in words), str(e.value)

    good = parquet(tmp_path / "in.parquet", rows)
    refused(tmp_path / "none.parquet", "there is no file")
    refused(tmp_path / "in.xlsx", "must end in .parquet or .csv")
    refused(good, "must end in .parquet or .csv", output="out.json")
    (tmp_path / "empty.csv").write_text("")
    refused(tmp_path / "empty.csv", "is empty")
    (tmp_path / "empty.parquet").write_bytes(b"")
    refused(tmp_path / "empty.parquet", "cannot be read")
    (tmp_path / "half.parquet").write_bytes(good.read_bytes()[:-100])
    refused(tmp_path / "half.parquet", "cannot be read")
    (tmp_path / "latin.csv").write_bytes("carrier,name\nUA,Zürich\n".encode("latin-1"))
    refused(tmp_path / "latin.csv", "UTF")
    (tmp_path / "twice.csv").write_text("carrier,carrier\nUA,UA\n")
    refused(tmp_path / "twice.csv", "column 'carrier' twice")
    refused(
        parquet(tmp_path / "a.parquet", [{"carier" if k == "carrier" else k: v for k, v in rows[0].items()}]),
        "did you mean 'carier'?",
    )
    refused(
        parquet(tmp_path / "b.parquet", [rows[0] | {"flight": 100.0}]), "'flight' has type double", 'astype("Int64")'
    )
    refused(
        parquet(tmp_path / "c.parquet", [rows[0] | {"distance": "far"}]),
        "'distance' has type string; write it as numbers",
    )
    refused(parquet(tmp_path / "d.parquet", [rows[0] | {"decision": True}]), "name of an answer")
    refused(parquet(tmp_path / "e.parquet", [rows[0] | {"tags": {"a": 1}}]), "CSV cannot hold", output="out.csv")
    more = pa.nulls(len(rows), pa.dictionary(pa.int32(), pa.binary()))
    pq.write_table(pq.read_table(good).append_column("more", more), tmp_path / "g.parquet")
    refused(tmp_path / "g.parquet", "column 'more' has type", "CSV cannot hold", output="out.csv")
    naive = pq.read_table(good)
    naive = naive.set_column(4, "departure", naive["departure"].cast(pa.timestamp("us")))
    pq.write_table(naive, tmp_path / "f.parquet")
    refused(tmp_path / "f.parquet", "'departure' has type timestamp[us]", 'tz_localize("UTC")')
    (tmp_path / "file").write_text("")
    refused(good, "cannot be written", output="file/out.parquet")
    scoring.score(good, tmp_path / "out.parquet", model, newest, 60)
    refused(good, "exists already", "--overwrite")


def test_a_file_without_rows(model, newest, rows, tmp_path):
    (tmp_path / "in.csv").write_text(",".join(rows[0]) + "\n")
    assert scoring.score(tmp_path / "in.csv", tmp_path / "out.csv", model, newest, 60).rows == 0
    pq.write_table(pq.read_table(parquet(tmp_path / "in.parquet", rows)).slice(0, 0), tmp_path / "none.parquet")
    scoring.score(tmp_path / "none.parquet", tmp_path / "out.parquet", model, newest, 60)
    assert (
        "probability" in pq.read_schema(tmp_path / "out.parquet").names
        and pq.read_metadata(tmp_path / "out.parquet").num_rows == 0
    )


def test_predictions_are_logged_as_the_service_does(model, newest, rows, tmp_path, small):
    source = parquet(tmp_path / "in.parquet", [*many(rows, 11), rows[0] | {"carrier": "", "note": ""}])
    log = PredictionLog(tmp_path / "log")
    scoring.score(source, tmp_path / "out.parquet", model, newest, 60, log=log)
    logged, found = read_predictions(tmp_path / "log"), pq.read_table(tmp_path / "out.parquet")
    logged["row"] = logged["request_id"].str.rpartition("-")[2].astype(int)
    logged = logged.sort_values("row")
    assert logged["row"].tolist() == list(range(11)) and set(logged["arm"]) == {"batch"}
    assert (
        logged["probability"].tolist() == found["probability"].to_pylist()
        and logged["carrier"].tolist() == found["carrier"].to_pylist()
    )
    assert np.allclose(logged["hour"], [model.samples["features"]["hour"][i] for i in range(11)])


# Kills and memory: real processes

SCORE = """
import sys, time
from pathlib import Path
from mlnb.data.snapshot_store import SnapshotStore
from mlnb.models.bundle import Bundle
from mlnb.serving import table_files, scoring
from mlnb.serving.predictions import PredictionLog
table_files.MAX_BATCH_ROWS = int(sys.argv[3])
model = Bundle.load("products/bundle")
def on_progress(update):
    print(update if isinstance(update, str) else update.rows, flush=True)
    time.sleep(float(sys.argv[4]))

newest = SnapshotStore(".mlnb/storage/context").newest
log = PredictionLog(sys.argv[5]) if len(sys.argv) > 5 else None
done = scoring.score(Path(sys.argv[1]), Path(sys.argv[2]), model, newest, 60, log=log, on_progress=on_progress)
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
print("kept", done.resumed_rows)
"""


def start(toy, *arguments):
    command = [sys.executable, "-c", SCORE, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=toy, env=toy_project.environment(toy), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def killed_after(process, lines):
    "Kill the process once it has printed so many lines"
    for _ in range(lines):
        assert process.stdout.readline(), process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_killed_run_goes_on(toy, model, newest, rows, tmp_path):
    source, output, log = parquet(tmp_path / "in.parquet", many(rows, 200)), tmp_path / "out.parquet", tmp_path / "log"
    killed_after(start(toy, source, output, 10, 0.05, log), 7)
    assert not output.exists()
    killed_after(start(toy, source, output, 10, 0.05, log), 12)
    assert not output.exists()
    said, wrong = start(toy, source, output, 10, 0, log).communicate()
    assert said.startswith("resuming an interrupted run") and not wrong
    assert int(said.split()[-1]) >= 100
    assert pq.read_table(output)["probability"].to_pylist() == [
        model.samples["outputs"]["probability"][i % 12] for i in range(200)
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "log", "out.parquet"]
    logged = read_predictions(log).drop_duplicates("request_id")
    assert sorted(logged["request_id"].str.rpartition("-")[2].astype(int)) == list(range(200))


def test_a_changed_input_starts_anew(toy, model, newest, rows, tmp_path):
    source, output = parquet(tmp_path / "in.parquet", many(rows, 40)), tmp_path / "out.parquet"
    killed_after(start(toy, source, output, 10, 0.05), 2)
    parquet(source, many(rows, 12))
    told = []
    done = scoring.score(source, output, model, newest, 60, on_progress=told.append)
    assert told[0].startswith("starting again: its size in bytes is") and done.resumed_rows == 0
    assert pq.read_table(output).num_rows == 12


def test_two_at_once(toy, model, newest, rows, tmp_path):
    source, output = parquet(tmp_path / "in.parquet", many(rows, 40)), tmp_path / "out.parquet"
    first = start(toy, source, output, 10, 0.5)
    first.stdout.readline()
    with pytest.raises(MlnbError, match=f"is being run by process {first.pid}"):
        scoring.score(source, output, model, newest, 60)
    assert first.communicate()[0].endswith("kept 0\n") and pq.read_table(output).num_rows == 40


@pytest.mark.long
def test_memory_does_not_grow_with_the_file(toy, rows, tmp_path):
    "Twenty times the rows, in a single row group, take the same memory but for a tenth"
    peaks = []
    for n in (60_000, 1_200_000):
        columns = columns_of([*Bundle.load(toy / "products/bundle").request, DECISION_TIME], rows)
        table = {name: np.resize(column, n) for name, column in columns.items()}
        table["flight"] = table["flight"].astype(int)
        table = pa.table({k: pa.array(v, pa.timestamp("s", "UTC")) if k in TIMES else v for k, v in table.items()})
        pq.write_table(table, tmp_path / f"{n}.parquet", row_group_size=n)
        del table
        said, wrong = start(toy, tmp_path / f"{n}.parquet", tmp_path / f"out{n}.parquet", 20_000, 0).communicate()
        assert not wrong
        peaks.append(int(said.split()[-3]))  # kilobytes
    assert peaks[1] < 1.1 * peaks[0] + 10_000, peaks
