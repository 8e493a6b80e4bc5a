"""Every command on every kind of model, from the pipeline to the notebook of an alert."""

import json
from base64 import b64decode
from importlib.util import find_spec

import every_kind
import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_project
import warm_cli
from every_kind import KINDS
from uvicorn_process import run_server

from mlnb.serving.column_validation import to_arrow_stream

ARROW = "application/vnd.apache.arrow.stream"
FAST = ("weekly", "regression")


def _marks(name):
    return [] if name in FAST else [pytest.mark.long]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name)) for name in KINDS])
def kind(request):
    kind = KINDS[request.param]
    for package in kind.needs:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return kind


@pytest.fixture(scope="module")
def project(kind, tmp_path_factory):
    "A project whose pipeline has run"
    root = every_kind.make(tmp_path_factory.mktemp("kind") / "shop", kind)
    if kind.layout:
        assert "pyproject.toml" in mlnb(root, "init")
    assert "executed" in mlnb(root, "run")
    return root


def mlnb(root, *words, code=0):
    "What a command prints in the project"
    done = warm_cli.run(words, cwd=root, env=toy_project.environment(root) | {"COLUMNS": "200"})
    assert done.returncode == code, f"mlnb {' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout if not code else done.stdout + done.stderr


@pytest.fixture(scope="module")
def samples(project):
    return json.loads((project / "products/bundle/samples.json").read_text())


def as_table(requests):
    "Requests as an Arrow table: images are bytes"
    table = pa.Table.from_pylist(requests)
    if "photo" in table.column_names:
        return pa.table({"photo": pa.array([b64decode(row["photo"]) for row in requests], pa.binary())})
    return table


def answers_of(rows, samples):
    "The answers to the samples by output field"
    return {name: [row[name] for row in rows] for name in samples["outputs"]}


def test_nothing_is_to_do_and_all_is_well(project):
    assert json.loads(mlnb(project, "plan", "--json"))["tasks"][0]["state"] == "current"
    assert "train" in mlnb(project, "runs", "show", "last")
    mlnb(project, "check")


@pytest.fixture(scope="module")
def answered(project, samples, kind):
    "The samples were answered in every format, logged, and one of them has a label; labels.csv has the others"
    requests = samples["requests"]
    columns = {name: [row[name] for row in requests] for name in requests[0]}
    server = run_server(project, project / ".mlnb/predictions", MLNB_LOG_COMPACT_MINUTES="0")
    with server as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        rows = client.post("/predict", json=requests).json()
        assert answers_of(rows, samples) == samples["outputs"]
        by_column = client.post("/predict/columns", json=columns).json()
        assert {name: by_column[name] for name in samples["outputs"]} == samples["outputs"]
        table = to_arrow_stream(as_table(requests))
        answered = client.post("/predict", content=table, headers={"content-type": ARROW, "accept": ARROW})
        assert answered.status_code == 200, answered.text
        by_column = pa.ipc.open_stream(answered.content).read_all().to_pydict()
        assert {name: by_column[name] for name in samples["outputs"]} == samples["outputs"]
        wrong = client.post("/predict", json={})
        assert wrong.status_code == 400 and next(iter(columns)) in wrong.text
        schema = client.get("/openapi.json").json()
        assert all(name in json.dumps(schema) for name in samples["outputs"])
        keys = [row["request_id"] for row in rows]
        if "customer" in requests[0]:
            keys = [row["customer"] for row in requests]
        label = client.post("/labels", json=[{"entity": keys[0], "value": kind.labels[0]}])
        assert label.json() == {"written": 1}, label.text
        assert client.post("/labels", json={"entity": keys[0], "value": {"no": "label"}}).status_code == 400
    logged = json.loads(mlnb(project, "predictions", "--json", "--limit", "100"))
    assert len(logged) == 3 * len(requests)
    first = next(row for row in logged if row["request_id"] == rows[0]["request_id"])
    assert {name: first[name] for name in samples["outputs"]} == answers_of(rows[:1], samples) | {
        name: rows[0][name] for name in samples["outputs"]
    }
    pd.DataFrame({"entity": keys[1:], "value": [kind.labels[i % 2] for i in range(len(keys) - 1)]}).to_csv(
        project / "labels.csv", index=False
    )
    return rows


def test_answers_in_every_format_and_back(answered, samples):
    assert answers_of(answered, samples) == samples["outputs"]


def test_the_log_is_compacted_and_scored(project, samples, answered):
    assert json.loads(mlnb(project, "compact", "--json"))["rows"] == 3 * len(samples["requests"])
    assert "v1" in mlnb(project, "predictions")
    added = json.loads(mlnb(project, "labels", "add", "labels.csv", "--json"))
    assert added["rejected"] == 0 and added["added"] == len(samples["requests"]) - 1
    assert "label" in mlnb(project, "labels", "status")
    report = json.loads(mlnb(project, "performance", "--json", "--html", "performance.html"))
    assert report["overall"]["known"] >= len(samples["requests"]) - 1
    assert (project / "performance.html").read_text().startswith("<!")
    assert "expected" in mlnb(project, "performance").lower() or report["overall"]["expected"] == {}


def test_files_are_scored_as_requests_are_answered(project, samples):
    pq.write_table(as_table(samples["requests"]), project / "in.parquet")
    mlnb(project, "score", "in.parquet", "out.parquet", "--overwrite")
    scored = pd.read_parquet(project / "out.parquet")
    as_lists = {name: [v.tolist() if hasattr(v, "tolist") else v for v in scored[name]] for name in samples["outputs"]}
    assert as_lists == samples["outputs"]


def test_drift_alerts_and_their_notebook(project, samples, answered):
    mlnb(project, "drift", "log", "--html", "drift.html")
    assert (project / "drift.html").read_text().startswith("<!")
    pq.write_table(as_table(samples["requests"] * 60), project / "later.parquet")
    mlnb(project, "drift", "later.parquet")
    done = warm_cli.run(["alerts", "check", "--json"], cwd=project, env=toy_project.environment(project))
    assert done.returncode in (0, 1, 3) and "Traceback" not in done.stderr, done.stderr
    for alert in json.loads(done.stdout)["alerts"][:1]:
        assert json.loads(mlnb(project, "alerts", "open", str(alert["id"]), "--json"))["failed"] is None
    mlnb(project, "alerts", "list")


def test_the_doctor_and_a_manifest_for_kubernetes(project):
    mlnb(project, "doctor")


@pytest.mark.long
def test_a_bento(project):
    assert "samples" in mlnb(project, "build")
