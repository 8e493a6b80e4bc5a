import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import toy_project
from waiting import free_port, wait_until_ready

from mlnb.data.snapshot_store import SnapshotStore
from mlnb.models.bundle import Bundle
from mlnb.serving.app import create_app
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.predictions import PredictionLog

SERVER = """
import sys
import uvicorn
from mlnb.project.settings import load_settings
from mlnb.serving.app import load_app
if __name__ == "__main__":
    uvicorn.run(load_app(load_settings(".")), port=int(sys.argv[1]), log_level="warning")
"""


@contextmanager
def serving(toy, predictions, **variables):
    "A uvicorn process that serves the toy project, and its URL"
    port = free_port()
    env = toy_project.environment(toy) | {"MLNB_PREDICTIONS": str(predictions), **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], cwd=toy, env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, wait_until_ready(process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(toy, tmp_path_factory):
    "A running service: a client, and the folder of its log"
    folder = tmp_path_factory.mktemp("predictions")
    with serving(toy, folder) as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        yield client, folder


@pytest.fixture
def row(toy):
    return toy_project.example(toy)


def test_the_samples_are_answered_to_the_bit(server, toy):
    samples = Bundle.load(toy / "products/bundle").samples
    many = server[0].post("/predict", json=samples["requests"]).json()
    assert [a["probability"] for a in many] == samples["outputs"]["probability"]
    assert [a["decision"] for a in many] == samples["outputs"]["decision"]
    one = [server[0].post("/predict", json=r).json() for r in samples["requests"]]
    assert [a["probability"] for a in one] == samples["outputs"]["probability"]


def test_an_answer_says_what_it_rests_on(server, row):
    answer = server[0].post("/predict", json=row | {"decision_time": "2013-07-01T05:07:30+02:00"}).json()
    assert list(answer) == [
        "request_id",
        "probability",
        "decision",
        "model_version",
        "arm",
        "context_moment",
        "context_age_seconds",
    ]
    assert answer["model_version"] == "v1"
    assert (answer["context_moment"], answer["context_age_seconds"]) == ("2013-07-01T03:00:00Z", 450)


def test_rows_of_one_request_may_have_different_contexts(server, row):
    times = ["2013-07-01T09:20:00Z", "2013-07-01T03:00:00Z", "2013-07-01T09:16:00Z", "2013-07-01T03:14:59Z"]
    many = server[0].post("/predict", json=[row | {"decision_time": t} for t in times]).json()
    one = [server[0].post("/predict", json=row | {"decision_time": t}).json() for t in times]
    assert [a["context_moment"][11:16] for a in many] == ["09:15", "03:00", "09:15", "03:00"]
    assert [a["probability"] for a in many] == [a["probability"] for a in one]


def test_every_answer_is_in_the_log(server, row):
    rows = [row | {"flight": i} for i in range(1000)]
    answers = server[0].post("/predict", json=rows).json()
    table = read_predictions(server[1]).set_index("request_id").loc[[a["request_id"] for a in answers]]
    assert table["probability"].tolist() == [a["probability"] for a in answers]
    assert (
        table["flight"].tolist() == list(range(1000))
        and table["hour"].notna().all()
        and (table["arm"] == "champion").all()
    )
    assert table["entity"].iloc[7] == "UA/7/JFK/2013-07-01T05:00:00Z"
    assert str(table["time"].iloc[0]) == row["decision_time"][:-1].replace("T", " ")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"1400"', "null", "true"])
def test_a_wrong_value_is_400_and_named(server, row, value):
    body = json.dumps([row, row | {"distance": "VALUE"}]).replace('"VALUE"', value)
    answer = server[0].post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    (problem,) = answer.json()["fields"]
    assert (problem["row"], problem["field"]) == (1, "distance") and "a finite number" in problem["expected"]


def test_missing_and_extra_fields_are_400_and_named(server, row):
    answer = server[0].post("/predict", json={k: v for k, v in row.items() if k != "origin"} | {"tailnum": "N1"})
    assert answer.status_code == 400 and [p["field"] for p in answer.json()["fields"]] == ["origin", "tailnum"]


@pytest.mark.parametrize(
    ("body", "says"),
    [(b"", "no body"), (b"[]", "empty"), (b"{", "not JSON"), (b"\xff", "UTF-8"), (b"[" * 90_000, "nested")],
)
def test_a_body_that_is_no_request_is_400(server, body, says):
    answer = server[0].post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and says in answer.json()["error"]


def test_another_content_type_is_415(server, row):
    answer = server[0].post("/predict", data={"carrier": "UA"})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]
    charset = {"content-type": "application/json; charset=utf-8"}
    assert server[0].post("/predict", content=json.dumps(row), headers=charset).status_code == 200


def test_a_body_over_the_limit_is_413_announced_or_in_chunks(server):
    big = b"[" + b" " * (1 << 20)
    announced = server[0].post("/predict", content=big, headers={"content-type": "application/json"})
    chunked = server[0].post("/predict", content=(big[i : i + 65536] for i in range(0, len(big), 65536)))
    for answer in (announced, chunked):
        assert answer.status_code == 413 and answer.json()["body_limit_bytes"] == 1 << 20


def test_unknown_paths_and_methods(server):
    assert server[0].get("/predictions").status_code == 404
    read = "GET, HEAD, OPTIONS"
    for method, path, right in [("GET", "/predict", "POST, OPTIONS"), ("POST", "/readyz", read), ("DELETE", "/", read)]:
        answer = server[0].request(method, path)
        assert answer.status_code == 405 and answer.headers["allow"] == right


@pytest.mark.parametrize(
    ("decision_time", "says"),
    [
        (None, "days old, the limit is 60 minutes"),
        ("2013-07-01T11:00:00Z", "is 75 minutes old"),
        ("2013-06-01T00:00:00Z", "no feature snapshot is available"),
    ],
)
def test_an_old_context_is_refused(server, row, decision_time, says):
    row = {k: v for k, v in row.items() if k != "decision_time"} | (
        {"decision_time": decision_time} if decision_time else {}
    )
    answer = server[0].post("/predict", json=row)
    assert answer.status_code == 503 and says in answer.json()["error"] and answer.json()["context_limit_minutes"] == 60
    assert ("context_age_seconds" in answer.json()) is ("old" in says)


def test_pages(server, row):
    client = server[0]
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
    page = client.get("/").json()
    assert page["example"] == row and "carrier" in page["fields"]
    api = client.get("/openapi.json").json()
    assert api == client.get("/docs.json").json() and api["openapi"] == "3.1.0"
    example = api["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert client.post("/predict", json=example).status_code == 200
    assert set(api["components"]["schemas"]["Answer"]["properties"]) == set(client.post("/predict", json=row).json())


def test_metrics(server, row):
    client = server[0]
    client.post("/predict", json=row)
    client.post("/predict", content=b"{")
    text = client.get("/metrics").text
    for status in (200, 400):
        validity = {200: "valid", 400: "invalid"}[status]
        assert f'mlnb_requests_total{{status="{status}",validity="{validity}"}}' in text
    assert 'mlnb_request_duration_seconds_bucket{arm="champion",le="0.0005",version="v1"}' in text
    assert (
        'mlnb_predictions_total{arm="champion",version="v1"}' in text and "mlnb_feature_snapshot_age_seconds 60" in text
    )


def test_the_context_limit_is_a_setting(toy, tmp_path, row):
    with serving(toy, tmp_path, MLNB_SNAPSHOT_MAX_AGE_MINUTES="100000000") as (_, url):
        row.pop("decision_time")
        answer = toy_project.post(f"{url}/predict", json=row).json()
    assert answer["context_moment"] == "2013-07-01T09:45:00Z" and answer["context_age_seconds"] > 3e8


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(toy, tmp_path, row):
    acknowledged, enough = [], threading.Event()

    def client(url, who):
        with httpx.Client(base_url=url, timeout=60) as http:
            for i in range(100_000):
                try:
                    answers = http.post("/predict", json=[row | {"flight": who}, row | {"flight": i}]).json()
                except (httpx.TransportError, json.JSONDecodeError):
                    return
                acknowledged.extend(a["request_id"] for a in answers)
                if i == 50:
                    enough.set()

    with serving(toy, tmp_path) as (process, url):
        threads = [threading.Thread(target=client, args=(url, who)) for who in range(4)]
        for t in threads:
            t.start()
        assert enough.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        for t in threads:
            t.join()
    logged = read_predictions(tmp_path)["request_id"]
    assert len(acknowledged) > 100 and logged.is_unique and set(acknowledged) <= set(logged)


def test_a_terminated_server_ends_cleanly(toy, tmp_path):
    with serving(toy, tmp_path) as (process, _):
        process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_a_prediction_that_cannot_be_logged_is_not_answered(toy, tmp_path, row):
    with serving(toy, tmp_path / "log") as (_, url):
        assert toy_project.post(f"{url}/predict", json=row).status_code == 200
        (file,) = (tmp_path / "log").iterdir()
        file.unlink()
        (tmp_path / "log").rmdir()
        (tmp_path / "log").write_text("in the way")
        answer = toy_project.post(f"{url}/predict", json=row)
        assert answer.status_code == 503 and "could not be logged" in answer.json()["error"]
        assert toy_project.get(f"{url}/readyz").status_code == 503
        (tmp_path / "log").unlink()
        assert toy_project.post(f"{url}/predict", json=row).status_code == 200
    assert len(read_predictions(tmp_path / "log")) == 1


NOTED = """
import sys
from collections import Counter
from types import SimpleNamespace
from mlnb.serving.service_metrics import ServiceMetrics
metrics = ServiceMetrics()
scorer = SimpleNamespace(log=SimpleNamespace(unlogged_predictions=0), counts={})
metrics.record_predictions(Counter(), int(sys.argv[1]), scorer)
print(metrics.text().decode())
"""


def test_the_age_of_the_context_is_not_that_which_a_dead_worker_noted(tmp_path):
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for seconds in (3600, 60):
        text = subprocess.run(
            [sys.executable, "-c", NOTED, str(seconds)], env=env, capture_output=True, text=True, check=True
        ).stdout
        assert f"mlnb_feature_snapshot_age_seconds {seconds}.0" in text


def call(app, body: bytes, cut: bool = False):
    "The messages that the application sends for one request"
    sent, parts = [], [{"type": "http.request", "body": body, "more_body": cut}, {"type": "http.disconnect"}]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "http", "method": "POST", "path": "/predict", "headers": []}, receive, send))
    return sent


@pytest.fixture
def app(toy, tmp_path):
    store = SnapshotStore(str(toy / ".mlnb/storage/context"))
    return create_app(Bundle.load(toy / "products/bundle"), store, PredictionLog(tmp_path), 60)


def test_an_internal_error_tells_its_id_and_nothing_else(app, row, capsys):
    def fail(features):
        raise RuntimeError("secret path")

    app.predictor.bundle.predict = fail
    start, body = call(app, json.dumps(row).encode())
    answer = json.loads(body["body"])
    assert start["status"] == 500 and "secret" not in str(answer) and "Traceback" not in str(answer)
    told = capsys.readouterr().err
    assert answer["request_id"] in told and "secret path" in told


def test_a_caller_that_goes_away_is_not_predicted(app, row, tmp_path):
    call(app, json.dumps(row).encode()[:20], cut=True)
    assert not list(tmp_path.iterdir())


def test_many_rows_are_one_pass(app, row):
    calls = []
    predict = app.predictor.bundle.predict
    app.predictor.bundle.predict = lambda features: calls.append(len(features["hour"])) or predict(features)
    call(app, json.dumps([row] * 1000).encode())
    assert calls == [1000]


def test_a_model_that_gives_no_number_is_an_internal_error(app, row):
    app.predictor.bundle.predict = lambda features: np.full(1, np.nan)
    assert call(app, json.dumps(row).encode())[0]["status"] == 500


def test_a_stalled_request_does_not_stop_the_others(server, row):
    host, port = server[0].base_url.host, server[0].base_url.port
    with socket.create_connection((host, port)) as stalled:
        stalled.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        assert server[0].post("/predict", json=row).status_code == 200
