"""A model of each kind: served, scored from files, logged, compacted, read back, swapped for another version."""

import csv
import json
import subprocess
import sys
from base64 import b64decode
from datetime import datetime

import httpx
import kinds
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_app import serving
from toy_project import environment, run

from mlnb.project.errors import SettingError
from mlnb.project.settings import load_settings
from mlnb.serving.column_validation import ARROW
from mlnb.serving.compactor import Compactor
from mlnb.serving.log_reader import LogReader
from mlnb.serving.predictions import PredictionLog

OWN = ("model_version", "arm", "context_moment", "context_age_seconds")


LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in kinds.LONG_KINDS]


@pytest.fixture(scope="module", params=[*kinds.KINDS, *LONG])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def project(kind, tmp_path_factory):
    return kinds.make(tmp_path_factory.mktemp(kind) / "project", kind)


@pytest.fixture(scope="module")
def samples(project):
    return json.loads((project / "products/bundle/samples.json").read_text())


def typed(rows: list[dict]) -> list[dict]:
    "Requests in JSON with bytes and times as Arrow and pandas have them"
    binary = lambda row: {name: row[name] and b64decode(row[name]) for name in ("photo", "document") if name in row}
    times = lambda row: {name: row[name] and datetime.fromisoformat(row[name]) for name in ("taken",) if name in row}
    return [row | binary(row) | times(row) for row in rows]


def mlnb(project, *words, code=0):
    command = [sys.executable, "-m", "mlnb.cli.main", *words]
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_each_kind_is_served_logged_and_read_back(project, samples, kind):
    rows, outputs = samples["requests"], samples["outputs"]
    expected = [dict(zip(outputs, values, strict=True)) for values in zip(*outputs.values(), strict=True)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    log = project / ".mlnb/predictions"
    with (
        serving(project, log, MLNB_LOG_COMPACT_MINUTES="0") as (_, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        many, one = client.post("/predict", json=rows), client.post("/predict", json=rows[0])
        assert many.status_code == one.status_code == 200, many.text
        answers = many.json()
        assert list(one.json()) == list(answers[0]) == ["request_id", *outputs, *OWN]
        assert [{name: answer[name] for name in outputs} for answer in [*answers, one.json()]] == [
            *expected,
            expected[0],
        ]
        by_column = client.post("/predict/columns", json=columns).json()
        assert {name: by_column[name] for name in outputs} == outputs
        table = pa.RecordBatch.from_pylist(typed(rows)) if kind != "custom" else pa.RecordBatch.from_pydict(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_batch(table)
        answered = client.post(
            "/predict", content=sink.getvalue().to_pybytes(), headers={"content-type": ARROW.decode()}
        )
        assert answered.status_code == 200, answered.text
        arrow = pa.ipc.open_stream(answered.content).read_all()
        assert arrow["model_version"].to_pylist() == ["v1"] * 12 and arrow.column_names == [
            "request_id",
            *outputs,
            *OWN,
        ]
        document = client.get("/openapi.json").json()
        answer = document["components"]["schemas"]["Answer"]
        assert answer["required"] == ["request_id", *outputs, *OWN]
    before = LogReader(log, project / ".mlnb/parts").frame()
    assert Compactor(log, project / ".mlnb/parts").run().rows == 37
    after = LogReader(log, project / ".mlnb/parts").frame()
    assert len(before) == len(after) == 37 and before.columns.tolist() == after.columns.tolist()
    by_id = after.set_index("request_id")
    for answer in answers:
        logged = by_id.loc[answer["request_id"]]
        for name in outputs:
            want, got = answer[name], logged[name]
            want = np.datetime64(want.rstrip("Z")) if isinstance(got, pd.Timestamp) else want
            assert np.array_equal(np.asarray(got), np.asarray(want)), name


def test_each_kind_is_scored_from_files(project, samples):
    requests, outputs = pd.DataFrame(samples["requests"]), samples["outputs"]
    pd.DataFrame(typed(samples["requests"])).to_parquet(project / "in.parquet", index=False)
    texts = requests.map(lambda value: json.dumps(value) if isinstance(value, list) else value)
    texts.to_csv(project / "in.csv", index=False, na_rep="")
    for source in ("in.parquet", "in.csv"):
        for output in ("out.parquet", "out.csv"):
            said = mlnb(project, "score", source, output, "--log", "--overwrite")
            assert "12 rows" in said and "rejected" not in said, said
    scored = pq.read_table(project / "out.parquet")
    assert scored.column_names[-len(outputs) - 2 :] == [*outputs, "model_version", "context_moment"]
    with (project / "out.csv").open() as file:
        first = next(csv.DictReader(file))
    for name, values in outputs.items():
        if isinstance(values[0], list):
            assert json.loads(first[name]) == values[0] and scored[name][0].as_py() == values[0]
        elif not isinstance(values[0], str):
            assert json.loads(first[name].lower()) == values[0] and scored[name][0].as_py() == values[0]


def test_each_kind_is_shown_profiled_and_exported(project, samples):
    shown = mlnb(project, "predictions", "--json")
    assert set(samples["outputs"]) <= set(json.loads(shown)[0])
    assert next(iter(samples["outputs"])) in mlnb(project, "predictions", "--limit", "3").replace("\n", "")
    for file in ("all.csv", "all.parquet"):
        mlnb(project, "predictions", "--output", file)
    assert "profiled" in mlnb(project, "compact")
    assert len(pd.read_parquet(project / "all.parquet")) == len(pd.read_csv(project / "all.csv"))


def test_the_round_trip_of_each_kind(project):
    code = "from mlnb.serving.round_trip import *; from mlnb.models.bundle import Bundle; "
    done = run(project, "-c", code + "print(verify_round_trip(Bundle.load('products/bundle')))")
    assert done.stdout.strip() == "12", done.stderr


def test_other_answers_need_a_service_of_their_own(tmp_path):
    code = """
from tiny import bundle, model
from mlnb.models.multiclass import Multiclass
from mlnb.models.watcher import verify_servable
served = bundle.build("one", "multiclass")
other = bundle.build("two", "multiclass", version="v2", problem=Multiclass(classes=("zero", "eight", "one")))
verify_servable("two", served)
"""
    done = run(kinds.make(tmp_path / "project", "multiclass"), "-c", code)
    assert "version v2 answers prediction (category 'zero' 'eight' 'one'), " in done.stderr
    assert "other answers need a service of their own" in done.stderr


@pytest.mark.parametrize(
    "name, message", [("entity", "so has every logged prediction"), ("text", "the model's inputs")]
)
def test_answers_that_the_log_could_not_hold_are_refused(tmp_path, name, message):
    code = f"""
from mlnb.data.fields import Field
from mlnb.models.custom import Custom
from tiny import bundle
bundle.build("other", "custom", problem=Custom((Field({name!r}, "number", "Name", 1.0),)))
"""
    done = run(kinds.make(tmp_path / "project", "custom"), "-c", code)
    assert message in done.stderr and not (tmp_path / "project/other").exists()


def test_a_row_with_its_own_request_id_counts_once(tmp_path):
    project = kinds.make(tmp_path / "project", "multiclass")
    log, row = project / ".mlnb/predictions", {"pixels": [0.0, 0.5, 0.0, 1.0]}
    with (
        serving(project, log, MLNB_LOG_COMPACT_MINUTES="0") as (_, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        first, again = (client.post("/predict", json=row | {"request_id": "r-1"}).json() for _ in range(2))
        assert first == again and first["request_id"] == "r-1"
        rows = [row | {"request_id": "r-2"}, row]
        assert [answer["request_id"] == "r-2" for answer in client.post("/predict", json=rows).json()] == [True, False]
        columns = {"pixels": [row["pixels"]] * 2, "request_id": ["r-3", "r-4"]}
        assert client.post("/predict/columns", json=columns).json()["request_id"] == ["r-3", "r-4"]
        table, sink = pa.table({"pixels": [[1.0, 1.0, 1.0, 1.0]], "request_id": ["r-4"]}), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        content = {"content": sink.getvalue().to_pybytes(), "headers": {"content-type": ARROW.decode()}}
        assert client.post("/predict", **content).status_code == 200
        for wrong, problem in (
            ("", "1 to 128"),
            (7, "7"),
            ("x" * 129, "128"),
            ("a\nb", "not printable"),
            (None, "null"),
        ):
            refused = client.post("/predict", json=row | {"request_id": wrong})
            assert refused.status_code == 400 and problem in refused.text, refused.text
        assert client.get("/openapi.json").json()["components"]["schemas"]["Row"]["required"] == ["pixels"]
    settings = load_settings(project)
    reader = LogReader.of(settings)
    before = reader.frame()
    Compactor.of(settings).run()
    for frame in (before, reader.frame()):
        ids = frame["request_id"].tolist()
        assert len(ids) == 5 and {"r-1", "r-2", "r-3", "r-4"} < set(ids) and frame["entity"].tolist() == ids
        assert frame.attrs["conflicting_ids"] == ["r-4"]
        assert frame.set_index("request_id").loc["r-4", "pixels"].tolist() == row["pixels"]
        assert "input.request_id" not in frame
    assert "1 request id came again with another input: r-4; the first input counts" in mlnb(project, "predictions")


def test_fields_are_masked_and_hashed_in_the_log(tmp_path):
    project = kinds.make(tmp_path / "project", "regression")
    log = project / ".mlnb/predictions"
    (project / "pyproject.toml").open("a").write(
        'log_masked_fields = ["area"]\nlog_hashed_fields = ["rooms", "city"]\n'
    )
    row = {"house": "Elm Street 7", "rooms": 3, "area": 81.5, "city": "Oslo"}
    with pytest.raises(SettingError, match="set the variable MLNB_LOG_HASH_KEY to a long secret text"):
        PredictionLog.of(load_settings(project))
    server = serving(project, log, MLNB_LOG_HASH_KEY="secret")
    with server as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        answers = [client.post("/predict", json=row).json()]
        columns = client.post("/predict/columns", json={name: [value] for name, value in row.items()}).json()
    assert answers[0]["prediction"] == columns["prediction"][0] == 273.75
    logged = LogReader.of(load_settings(project)).frame()
    assert logged["area"].isna().all() and logged["rooms"].nunique() == logged["city"].nunique() == 1
    assert logged["rooms"].str.len().eq(32).all() and logged["entity"].eq("Elm Street 7").all()
    assert not any(b"Oslo" in file.read_bytes() for file in log.iterdir())


def test_a_field_that_may_be_null_is_tried(tmp_path):
    code = """
import msgspec
from mlnb.data.fields import Field
from mlnb.serving.round_trip import verify_round_trip
from tiny import bundle
customer, months, calls = bundle.KINDS["binary"]["request"]
calls = msgspec.structs.replace(calls, nullable=True)
verify_round_trip(bundle.build("one", "binary", request=[customer, months, calls]))
"""
    done = run(kinds.make(tmp_path / "project", "binary"), "-c", code)
    assert "field 'calls' may be null, and tiny.model.Churn cannot answer that" in done.stderr
