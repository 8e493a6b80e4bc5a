"""Nobody waits for another's long request, nor for a storage that fails or hangs: probes, rows and what is in memory
go on."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import toy_project
from away_storage import ERRORS
from waiting import free_port, until, wait_until_ready

from mlnb.data.snapshot_store import NotCached, SnapshotStore
from mlnb.project.errors import ServingError
from mlnb.project.files import find_files, open_url, publish
from mlnb.serving.column_validation import ARROW, to_arrow_stream
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.part_store import LogPart, LogPartStore

SERVER = """
import sys
sys.path.insert(0, {tests!r})
import away_storage
import uvicorn
from mlnb.data.snapshot_store import SnapshotStore
from mlnb.project.settings import load_settings
from mlnb.serving import app, chunked_scoring
from mlnb.serving.uvicorn_server import LimitedHttpProtocol
SnapshotStore.of = classmethod(lambda cls, settings: cls(settings.url(settings.storage) + "/context", refresh=0.3))
chunked_scoring.RETRY_DELAY_SECONDS, chunked_scoring.SnapshotReader.__init__.__defaults__ = 0.1, (1.0,)
uvicorn.run(app.load_app(load_settings(".")), port={port}, log_level="warning", http=LimitedHttpProtocol)
"""
TABLE = {"content-type": ARROW.decode()}


@pytest.fixture(scope="module")
def service(toy, tmp_path_factory):
    "A client of a service whose storage may be made to fail; the file that says how; the folder of its log"
    folder, port = tmp_path_factory.mktemp("away"), free_port()
    (mode := folder / "mode").write_text("")
    env = toy_project.environment(toy) | {"AWAY_MODE": str(mode), "MLNB_STORAGE": f"away://{toy}/.mlnb/storage"}
    env |= {
        "MLNB_PREDICTIONS": str(folder / "log"),
        "MLNB_REQUEST_TIMEOUT_SECONDS": "60",
        "MLNB_SNAPSHOT_MAX_AGE_MINUTES": "100000000",
    }
    code = SERVER.format(tests=str(Path(__file__).parent), port=port)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=toy, env=env, stderr=subprocess.PIPE, text=True)
    try:
        url = wait_until_ready(process, f"http://127.0.0.1:{port}")
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, mode, folder / "log"
    finally:
        process.kill()
        process.communicate()


@contextmanager
def the_storage(mode: Path, does: str):
    mode.write_text(does)
    try:
        yield
    finally:
        mode.write_text("")


def replay(toy, number: int) -> dict:
    "A request whose context is that of a quarter of an hour"
    return toy_project.example(
        toy, decision_time=str(np.datetime64("2013-07-01T02:05:00") + np.timedelta64(15 * number, "m")) + "Z"
    )


@pytest.mark.parametrize(("number", "error"), list(enumerate(ERRORS, 5)))
def test_every_error_of_a_storage_is_503_and_what_is_in_memory_goes_on(service, toy, number, error):
    client, mode, _ = service
    kept = replay(toy, 0)
    assert client.post("/predict", json=kept).status_code == 200
    with the_storage(mode, error):
        refused = client.post("/predict", json=replay(toy, number))
        assert (
            refused.status_code == 503
            and refused.headers["retry-after"]
            and "storage cannot be read" in refused.json()["error"]
        )
        assert client.post("/predict", json=[kept, replay(toy, number)]).status_code == 503
        assert client.post("/predict", json=kept).status_code == client.get("/readyz").status_code == 200
        time.sleep(0.7 if number == 5 else 0.0)  # a listing is overdue
        assert [client.post("/predict", json=kept).status_code for _ in range(3)] == [200] * 3
    until(lambda: client.post("/predict", json=replay(toy, number)).status_code == 200, "the storage is back")


def test_a_storage_that_hangs_keeps_nobody_else(service, toy):
    client, mode, _ = service
    kept, answers = replay(toy, 0), []
    assert client.post("/predict", json=kept).status_code == 200
    with the_storage(mode, "hang"):
        ask = lambda: answers.append(httpx.post(f"{client.base_url}/predict", json=replay(toy, 20), timeout=60))
        waiting = [threading.Thread(target=ask) for _ in range(3)]
        for thread in waiting:
            thread.start()
        while not answers:
            assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
            assert client.post("/predict", json=kept).status_code == 200
            time.sleep(0.05)
        for thread in waiting:
            thread.join()
        time.sleep(0.7)
        assert client.post("/predict", json=kept).status_code == 200  # a listing is overdue, and hangs
        assert {(a.status_code, a.headers["retry-after"]) for a in answers} == {(503, "1")}
    until(lambda: client.post("/predict", json=replay(toy, 20)).status_code == 200, "the storage is back")


def slow_table(toy, n: int) -> pa.Table:
    "Many rows in few bytes: texts and numbers of few values, and a time of decision for each"
    row, i = toy_project.example(toy), np.arange(n)
    texts = {
        name: pa.DictionaryArray.from_arrays(pa.array((i % 2).astype(np.int8)), [row[name], "B6"])
        for name in ("carrier", "origin")
    }
    numbers = {"flight": (i % 100).astype(np.int8), "distance": (i % 100).astype(np.int16)}
    times = {
        "departure": np.datetime64("2013-07-01T12:00", "s") + i % 7,
        "decision_time": np.datetime64("2013-07-01T03:00", "s") + i % 20_000,
    }
    return pa.table(texts | numbers | {name: pa.array(t).cast(pa.timestamp("s", "UTC")) for name, t in times.items()})


def asked_beside(client, row: dict, work) -> tuple[float, list[float]]:
    "The seconds of a long request, and those that each request of one row took meanwhile"
    done, seconds = threading.Event(), []

    def ask():
        with httpx.Client(base_url=client.base_url, timeout=60) as other:
            while not done.is_set():
                started = time.perf_counter()
                assert other.post("/predict", json=row).status_code == other.get("/livez").status_code == 200
                seconds.append(time.perf_counter() - started)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: seconds, "an answer")
    seconds.clear()
    started = time.perf_counter()
    work()
    took = time.perf_counter() - started
    done.set()
    asking.join()
    return took, seconds


@pytest.mark.parametrize("form", ["arrow", "columns", "rows"])
def test_a_long_request_leaves_turns_to_others_and_is_logged_whole(service, toy, form):
    client, _, log = service
    table, before = (
        slow_table(toy, {"arrow": 20_000, "columns": 5_000, "rows": 4_000}[form]),
        len(read_predictions(log)),
    )
    columns = {
        name: [v.strftime("%Y-%m-%dT%H:%M:%SZ") if hasattr(v, "strftime") else v for v in c]
        for name, c in table.to_pydict().items()
    }
    rows = (
        [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if form == "rows"
        else []
    )
    ways = {
        "arrow": lambda: client.post("/predict", content=to_arrow_stream(table), headers=TABLE),
        "columns": lambda: client.post("/predict/columns", json=columns),
        "rows": lambda: client.post("/predict", json=rows),
    }
    answers = []
    took, others = asked_beside(client, replay(toy, 0), lambda: answers.append(ways[form]()))
    assert answers[0].status_code == 200, answers[0].text
    assert len(others) >= 3 and max(others) < took / 2
    if form == "rows":
        ids = [a["request_id"] for a in answers[0].json()]
    elif form == "columns":
        ids = answers[0].json()["request_id"]
    else:
        ids = pa.ipc.open_stream(answers[0].content).read_all()["request_id"].to_pylist()
    logged = read_predictions(log).set_index("request_id")
    assert len(logged) >= before + table.num_rows and len(set(ids)) == table.num_rows
    assert logged.loc[ids, "flight"].tolist() == table["flight"].to_pylist()
    few = [0, 7, table.num_rows - 1]
    one = [client.post("/predict", content=to_arrow_stream(table.slice(i, 1)), headers=TABLE) for i in few]
    assert logged.loc[[ids[i] for i in few], "probability"].tolist() == [
        pa.ipc.open_stream(a.content).read_all()["probability"][0].as_py() for a in one
    ]


def test_a_wrong_row_of_a_long_request_is_named_by_its_number_and_nothing_is_logged(service, toy):
    client, _, log = service
    table, before = slow_table(toy, 3_000), len(read_predictions(log))
    late = table["decision_time"].to_pylist()
    late[2_500] = late[0].replace(year=1999)  # before any context
    table = table.set_column(
        table.column_names.index("decision_time"), "decision_time", pa.array(late, pa.timestamp("s", "UTC"))
    )
    answer = client.post("/predict", content=to_arrow_stream(table), headers=TABLE)
    assert answer.status_code == 503 and answer.json()["row"] == 2_500 and len(read_predictions(log)) == before


@pytest.mark.parametrize("error", ERRORS)
def test_calls_of_a_storage_fail_with_an_oserror_alone(tmp_path, monkeypatch, error):
    (mode := tmp_path / "mode").write_text(error)
    monkeypatch.setenv("AWAY_MODE", str(mode))
    files, place = open_url(f"away://{tmp_path}/context")
    store = SnapshotStore(f"away://{tmp_path}/context")
    calls = [
        lambda: find_files(files, place),
        lambda: publish(files, f"{place}/x", b""),
        store.as_of_times,
        lambda: store.newest(np.datetime64("now")),
    ]
    for call in calls:
        with pytest.raises(OSError, match=f"the storage says {error}"):
            call()
    parts = LogPartStore(f"away://{tmp_path}/log")
    part = LogPart(f"{place}/x", 1, "v1", "2013-07-01T00", "log", "stamp", "1")
    for call in (lambda: parts.remove(["x"]), lambda: parts.read_part(part)):
        with pytest.raises(OSError):
            call()
    with pytest.raises(ServingError, match=f"the storage says {error}"):
        parts.parts()
    with pytest.raises(NotCached):
        store.newest_cached(np.datetime64("now"))
    os.mkdir(place)
    mode.write_text("")
    assert store.newest(np.datetime64("now")) is None and json.dumps(find_files(files, place)) == "{}"
