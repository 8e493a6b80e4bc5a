"""Outcomes sent to a real service: who may, what is refused, and that what was answered is kept."""

import json
import os
import signal
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import toy_project
from uvicorn_process import run_server, workers

from mlnb.serving.labels import LabelStore, compact_labels, current_labels

PREDICT, ADMIN = "predict-key-of-enough-length", "admin-key-of-enough-length-1"
GOOD = {"entity": "UA/100/JFK/2013-07-01T05:00:00Z", "value": 1, "observed_at": "2013-07-01T12:00:00Z"}


@pytest.fixture(scope="module")
def service(toy, tmp_path_factory):
    "A running service without keys, and where it writes outcomes"
    folder = tmp_path_factory.mktemp("service")
    server = run_server(toy, folder / "predictions", MLNB_LABELS=str(folder / "outcomes"))
    with server as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        yield client, folder / "outcomes"


def kept(folder: Path) -> list[dict]:
    return LabelStore(folder, str(folder / "none")).read().to_pylist()


def test_what_was_answered_is_kept(service):
    client, folder = service
    before = len(kept(folder))
    assert client.post("/labels", json=GOOD).json() == {"written": 1}
    many = [GOOD | {"entity": f"e{i}", "value": i % 2} for i in range(1000)]
    assert client.post("/labels", json=many).json() == {"written": 1000}
    rows = kept(folder)[before:]
    assert (
        [r["entity"] for r in rows[1:]] == [f"e{i}" for i in range(1000)]
        and rows[0]["value"] == 1
        and rows[0]["source"] == "service"
    )
    assert rows[0]["observed_at"] == datetime(2013, 7, 1, 12, tzinfo=UTC)


def test_an_outcome_without_a_moment_is_known_now(service):
    client, folder = service
    before = datetime.now(UTC)
    client.post("/outcomes", json={"entity": "now", "value": False})
    (row,) = (r for r in kept(folder) if r["entity"] == "now")
    assert before <= row["observed_at"] == row["received_at"] <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"value": 2}, "value", "neither 0 nor 1"),
        ({"value": 0.5}, "value", "neither 0 nor 1"),
        ({"value": 2, "observed_at": "2013-07-01t12:00:00z"}, "value", "neither 0 nor 1"),
        ({"value": "1"}, "value", "0 or 1"),
        ({"value": None}, "value", "0 or 1"),
        ({"entity": ""}, "entity", "printable"),
        ({"entity": "x" * 100_000}, "entity", "printable"),
        ({"entity": "a\x00"}, "entity", "printable"),
        ({"entity": 7}, "entity", "printable"),
        ({"observed_at": "2999-01-01T00:00:00Z"}, "observed_at", "in the future"),
        ({"observed_at": "2013-07-01T12:00:00"}, "observed_at", "offset"),
        ({"observed_at": "0001-01-01T00:00:00Z"}, "observed_at", "between the years"),
        ({"label": 1}, "label", "is not a field"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_kept(service, change, field, says):
    client, folder = service
    before = len(kept(folder))
    answer = client.post("/labels", json=[GOOD, GOOD | change])
    assert answer.status_code == 400 and len(kept(folder)) == before
    (problem,) = answer.json()["fields"]
    assert (problem["row"], problem["field"]) == (1, field) and says in problem["problem"] + problem["expected"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no body"),
        (b"[]", "empty"),
        (b"{", "not JSON"),
        (b"\xff", "UTF-8"),
        (b"[" * 90_000, "nested"),
        (b'{"entity": "a", "value": NaN}', "value"),
        (b'{"entity": "a", "entity": "b", "value": 1}', "entity"),
        (b'{"entity": "a", "value": 1, "v\\u0061lue": 0}', "value"),
    ],
)
def test_a_body_that_holds_no_outcomes_is_400(service, body, says):
    answer = service[0].post("/labels", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and says in answer.json()["error"]


def test_the_guard_of_predictions_holds_here_too(service):
    client, _ = service
    assert client.get("/labels").status_code == 405
    assert client.post("/labels", content=b"a,b", headers={"content-type": "text/csv"}).status_code == 415
    long = json.dumps([GOOD] * 12_000).encode()
    assert client.post("/labels", content=long, headers={"content-type": "application/json"}).status_code == 413


def test_only_a_key_of_an_admin_may_say_what_is_true(toy, tmp_path):
    keys = f"predict:{PREDICT},admin:{ADMIN}"
    with run_server(toy, tmp_path / "p", MLNB_LABELS=str(tmp_path / "o"), MLNB_KEYS=keys) as (_, url):
        send = lambda **headers: toy_project.post(f"{url}/labels", json=GOOD, headers=headers).status_code
        assert send() == 401
        assert send(authorization=f"Bearer {PREDICT}") == 403
        assert list((tmp_path / "o").glob("*.jsonl")) == []
        assert send(authorization=f"Bearer {ADMIN}") == 200
    assert len(kept(tmp_path / "o")) == 1


def test_a_killed_worker_loses_nothing_and_its_file_is_gathered(toy, tmp_path):
    store = LabelStore(tmp_path / "o", str(tmp_path / "parts"))
    with run_server(toy, tmp_path / "p", "--workers", "2", MLNB_LABELS=str(tmp_path / "o")) as (process, url):
        written = 0
        for i in range(40):
            if i == 20:
                os.kill(workers(process)[0].pid, signal.SIGKILL)
            with suppress(httpx.NetworkError, httpx.RemoteProtocolError):  # the worker died
                written += toy_project.post(f"{url}/labels", json=GOOD | {"entity": f"e{i}"}).status_code == 200
        assert compact_labels(store) < written  # a file that a worker has open is left alone
        assert current_labels(store.read()).num_rows >= written > 0
    compact_labels(store)
    assert not list((tmp_path / "o").glob("*.jsonl")) and current_labels(store.read()).num_rows >= written


def test_a_folder_that_cannot_be_written_to_is_said(toy, tmp_path):
    (tmp_path / "o").write_text("a file")
    with run_server(toy, tmp_path / "p", MLNB_LABELS=str(tmp_path / "o")) as (_, url):
        answer = toy_project.post(f"{url}/labels", json=GOOD)
    assert answer.status_code == 503 and "cannot be written" in answer.json()["error"]
