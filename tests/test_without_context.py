"""Every command on a bundle of another kind: no context, no entity, no times, no categories, and no reference until
one is written."""

import json
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import toy_project
from click.testing import CliRunner
from uvicorn_process import run_server

from mlnb.cli.main import cli
from mlnb.data.profiles import Profile
from mlnb.models.bundle import Bundle
from mlnb.serving.column_validation import to_arrow_stream


@pytest.fixture(scope="module", params=[(), ("customer", "age")], ids=["no entity", "an entity"])
def project(request, tmp_path_factory):
    return toy_project.make_without_context(tmp_path_factory.mktemp("plain") / "project", *request.param)


@pytest.fixture
def mlnb(project, monkeypatch):
    "Runs a command in the project, in this process; gives what it prints"
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))

    def call(*arguments, code=0):
        done = CliRunner(env={"COLUMNS": "160"}).invoke(cli, arguments)
        assert done.exit_code == code, done.output + repr(done.exception)
        return done.stdout or str(done.exception)

    return call


def rows(project) -> list[dict]:
    return json.loads((project / "products/bundle/samples.json").read_text())["requests"]


def yesterday(hour: int) -> str:
    return f"{datetime.now(UTC) - timedelta(days=2):%Y-%m-%d}T{hour:02}:00:00Z"


def test_score_by_file_and_service_alike(project, mlnb):
    expected = json.loads((project / "products/bundle/samples.json").read_text())["outputs"]["probability"]
    pd.DataFrame(rows(project)).to_csv(project / "in.csv", index=False)
    pd.DataFrame(rows(project)).to_parquet(project / "in.parquet")
    for source, output in (("in.csv", "out.csv"), ("in.parquet", "out.parquet")):
        assert mlnb("score", source, output, "--log", "--at", yesterday(3), "--overwrite").startswith("Scored 12 rows")
        found = pd.read_csv(project / output) if output.endswith("csv") else pd.read_parquet(project / output)
        assert found["probability"].tolist() == expected and found["context_moment"].isna().all()
    server = run_server(project, project / ".mlnb/predictions", MLNB_LOG_COMPACT_MINUTES="0")
    with server as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        one = client.post("/predict", json=rows(project)[0] | {"decision_time": yesterday(5)}).json()
        assert (one["probability"], one["context_moment"], one["context_age_seconds"]) == (expected[0], None, None)
        many = client.post("/predict", json=rows(project)).json()
        assert [answer["probability"] for answer in many] == expected
        table = pa.Table.from_pylist(rows(project)).set_column(
            1, "age", pa.array([row["age"] for row in rows(project)], pa.int64())
        )
        arrow = {"content-type": "application/vnd.apache.arrow.stream", "accept": "application/vnd.apache.arrow.stream"}
        answered = client.post("/predict", content=to_arrow_stream(table), headers=arrow)
        assert answered.status_code == 200, answered.text
        assert pa.ipc.open_stream(answered.content).read_all()["probability"].to_pylist() == expected
        id_or_key = one["request_id"] if not Bundle.load(project / "products/bundle").entity else "C-0000/20"
        assert client.post("/outcomes", json={"entity": id_or_key, "value": 0}).json() == {"written": 1}
        assert client.get("/openapi.json").status_code == 200


def test_predictions_compact_outcomes_performance(project, mlnb):
    logged = json.loads(mlnb("predictions", "--json", "--limit", "100"))
    assert len(logged) == 2 * 12 + 1 + 2 * 12
    if not Bundle.load(project / "products/bundle").entity:
        assert all(row["entity"] == row["request_id"] for row in logged)
    assert "v1" in mlnb("predictions")
    assert json.loads(mlnb("compact", "--json"))["rows"] == len(logged) and mlnb("compact").startswith(
        "nothing to compact"
    )
    batch = pd.DataFrame([row for row in logged if row["arm"] == "batch"])
    key = "entity" if Bundle.load(project / "products/bundle").entity else "request_id"
    batch.assign(value=(batch["income"] > 60_000).astype(int))[[key, "value"]].drop_duplicates(key).to_csv(
        project / "y.csv", index=False
    )
    told = json.loads(mlnb("labels", "add", "y.csv", "--json"))
    already_sent = key == "entity"  # to the service, for C-0000/20
    assert (told["rejected"], told["unknown"]) == (0, 0) and told["added"] == batch[key].nunique() - already_sent
    assert "have a label" in mlnb("labels", "status") and mlnb("labels", "show", batch[key][0]).startswith(
        "0  observed at"
    )
    scored = json.loads(mlnb("performance", "--json", "--group-by", "age", "--html", "performance.html"))
    assert scored["overall"]["known"] >= 12 and scored["overall"]["realised"]["auc"] > 0.9
    assert "cost" in mlnb("performance", "--window", "day")


def test_drift_and_alerts(project, mlnb):
    assert "has no reference profile to compare with" in mlnb("drift", "log", code=1)
    (alert,) = json.loads(mlnb("alerts", "check", "--json", code=1))["alerts"]
    assert "pass `reference`" in alert["words"]
    from plain.bundle import build  # of this project

    n = np.arange(600)
    training = pd.DataFrame({"customer": "C-0000", "age": n % 50 + 20.0, "income": n % 97 * 1e3})
    build(
        project / "products/bundle",
        Bundle.load(project / "products/bundle").manifest.entity,
        reference=Profile.of(training).to_bytes(),
    )
    assert "columns" in mlnb("drift", "log", "--window", "day", "--html", "drift.html", "--metrics", "drift.prom")
    checked = json.loads(mlnb("alerts", "check", "--json", code=1))
    moved = next(alert for alert in checked["alerts"] if alert["subject"] == "customer")
    assert "new values" in moved["words"]
    assert json.loads(mlnb("alerts", "open", str(moved["id"]), "--json"))["failed"] is None
