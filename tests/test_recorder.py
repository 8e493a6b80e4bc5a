"""The recorder in front of stores that fail, and under kill -9: nothing is lost, and one sentence says so."""

import gc
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from waiting import until

from mlnb.pipelines import recorder as module
from mlnb.pipelines.recorder import JOURNAL, Recorder, replay
from mlnb.records import Records


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/records.db"


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    "A journal that is left stays one: the store is not opened before the recorder is closed"
    monkeypatch.setattr(module, "START_DELAY_SECONDS", 60.0)


@pytest.fixture
def quick(monkeypatch, slow):
    monkeypatch.setattr(module, "START_DELAY_SECONDS", 0.0)


def whole_run(recorder, seed=0, wait=True):
    "A run of two tasks"
    run = recorder.start_run("demo", {"seed": seed}, selection={"tasks": ["b"]})
    recorder.put_task(run, "a", status="skipped")
    recorder.put_task(run, "b", status="running", reason="b.txt is not there")
    recorder.put_task(run, "b", status="executed", seconds=1.5, metrics={"auc": 0.5})
    recorder.end_run(run, "succeeded")
    recorder.close(wait=wait)
    return run


def is_whole(url, run, seed=0):
    "Whether all of `whole_run` is in the store"
    records = Records(url)
    try:
        found, tasks = records.run(run), records.tasks(run)
    finally:
        records.close()
    assert (found["parameters"], found["status"], found["selection"]) == ({"seed": seed}, "succeeded", {"tasks": ["b"]})
    assert [(t["name"], t["status"]) for t in tasks] == [("a", "skipped"), ("b", "executed")]
    assert (tasks[1]["reason"], tasks[1]["metrics"]) == ("b.txt is not there", {"auc": 0.5}) and found[
        "ended"
    ] >= found["started"]
    return True


def test_a_run_is_in_the_store_when_the_recorder_is_closed(url, runs):
    run = whole_run(Recorder(url, runs))
    assert is_whole(url, run) and not (runs / run).exists()


def test_a_run_is_seen_while_it_goes_on(url, runs, quick):
    with Recorder(url, runs) as recorder:
        run = recorder.start_run("demo", {})
        records = Records(url)
        until(lambda: [r["status"] for r in records.runs()] == ["running"])
        for status in ("running", "failed"):
            recorder.put_task(run, "a", status=status)
            until(lambda status=status: [t["status"] for t in records.tasks(run)] == [status])
        assert replay(records, runs) == []  # its journal is its own
        records.close()


def test_a_run_does_not_wait_for_imports(url, runs):
    code = f"""
import sys
from pathlib import Path
from mlnb.pipelines.recorder import Recorder
recorder = Recorder({url!r}, Path({str(runs)!r}))
run = recorder.start_run("demo", {{"seed": 0}})
for i in range(50):
    recorder.put_task(run, f"t{{i}}", status="skipped")
recorder.end_run(run, "succeeded")
recorder.close(wait=False)
print(run, "sqlalchemy" in sys.modules)
"""
    run, imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert imported == "False" and (runs / run / JOURNAL).exists()
    later = whole_run(Recorder(url, runs))
    records = Records(url)
    assert (
        {r["id"] for r in records.runs()} == {run, later}
        and len(records.tasks(run)) == 50
        and not (runs / run).exists()
    )
    records.close()


def test_many_tasks_in_order(url, runs, quick):
    with Recorder(url, runs) as recorder:
        run = recorder.start_run("demo", {})
        for i in range(1000):
            recorder.put_task(run, f"t{i}", status="waiting")
            recorder.put_task(run, f"t{i}", status="executed", seconds=i / 10)
    records = Records(url)
    tasks = records.tasks(run)
    assert [t["name"] for t in tasks] == [f"t{i}" for i in range(1000)]
    assert {t["status"] for t in tasks} == {"executed"} and tasks[-1]["seconds"] == 99.9
    records.close()


def test_values_of_numpy_and_paths(url, runs, tmp_path):
    import numpy as np

    with Recorder(url, runs) as recorder:
        run = recorder.start_run("demo", {"n": np.int64(3), "where": tmp_path})
        recorder.put_task(
            run, "a", metrics={"auc": np.float32(0.5)}, notebook=tmp_path / "a.ipynb", seconds=np.float64(0.25)
        )
        with pytest.raises(TypeError, match="no column 'secs'"):
            recorder.put_task(run, "a", secs=1)
    records = Records(url)
    (task,) = records.tasks(run)
    assert records.run(run)["parameters"] == {"n": 3, "where": str(tmp_path)}
    assert (task["metrics"], task["notebook"], task["seconds"]) == ({"auc": 0.5}, str(tmp_path / "a.ipynb"), 0.25)
    records.close()


def no_database(file):
    file.write_text("this is not SQLite " * 100)
    yield
    file.unlink()


def a_folder(file):
    file.mkdir()
    yield
    file.rmdir()


def no_folder(file):
    file.parent.touch()
    yield
    file.parent.unlink()


def read_only(file):
    "A disk that is mounted for reading only, or, for who is not root, a folder"
    Records(f"sqlite:///{file}").runs()
    if os.geteuid():
        file.chmod(0o444)
        file.parent.chmod(0o555)
        yield
        file.parent.chmod(0o755)
        file.chmod(0o644)
        return
    mount = ["mount", "--bind", "-o", "ro", file.parent, file.parent]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield
    gc.collect()
    subprocess.run(["umount", file.parent], check=True)


@pytest.mark.parametrize("failing", [read_only, no_database, a_folder, no_folder])
def test_a_store_that_fails_loses_nothing_and_is_said_once(failing, runs, tmp_path, caplog, quick):
    file = tmp_path / "kept" / "records.db"
    url, failure = f"sqlite:///{file}", failing(file)
    if failing is not no_folder:
        file.parent.mkdir()
    next(failure)
    try:
        recorder = Recorder(url, runs)
        run = whole_run(recorder)
    finally:
        next(failure, None)
    (said,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"run {run} could not be written to the records (" in said and f"kept in {runs / run / JOURNAL}" in said
    assert recorder.problem
    next_run = whole_run(Recorder(url, runs), seed=1)  # the store is well again
    assert is_whole(url, run) and is_whole(url, next_run, seed=1) and not list(runs.iterdir())


def test_a_server_that_is_not_there(url, runs, caplog, quick):
    run = whole_run(Recorder("postgresql://me:secret@127.0.0.1:1/nothing", runs))
    kept = (runs / run / JOURNAL).read_text()
    assert "could not be written" in caplog.text and "secret" not in caplog.text and "secret" not in kept
    assert kept.splitlines()[0] == '["store", "postgresql://me@127.0.0.1:1/nothing"]' and kept.count("\n") >= 6
    later = whole_run(Recorder(url, runs), seed=1)  # of another environment
    records = Records(url)
    assert [r["id"] for r in records.runs()] == [later] and (runs / run / JOURNAL).read_text() == kept
    records.close()


def test_a_store_that_never_answers(url, runs, caplog, quick, monkeypatch):
    monkeypatch.setattr(module, "CLOSE_TIMEOUT_SECONDS", 0.2)
    recorder, answer = Recorder(url, runs), threading.Event()
    put = recorder._store.records.put
    monkeypatch.setattr(recorder._store.records, "put", lambda changes: answer.wait() and put(changes))
    run = whole_run(recorder)
    assert "no answer within" in caplog.text and (runs / run / JOURNAL).exists()
    records = Records(url)
    assert replay(records, runs) == [run] and is_whole(url, run)
    answer.set()  # late, and for the second time
    recorder._thread.join()
    assert is_whole(url, run)
    records.close()


def test_a_project_that_was_moved(tmp_path):
    run = whole_run(Recorder(f"sqlite:///{tmp_path}/a/records.db", tmp_path / "a" / "runs"), wait=False)
    (tmp_path / "a").rename(tmp_path / "b")
    records = Records(f"sqlite:///{tmp_path}/b/records.db")
    assert replay(records, tmp_path / "b" / "runs") == [run]
    records.close()


def test_a_store_that_is_locked_for_a_while(url, runs, caplog, quick, monkeypatch):
    monkeypatch.setattr(module, "RETRY_DELAY_SECONDS", 0.0)
    Records(url).runs()
    holder = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("begin immediate")
    recorder = Recorder(url, runs)
    recorder._store.records.lock_timeout = 0.1
    run = recorder.start_run("demo", {"seed": 0})
    until(lambda: recorder.problem)
    assert "locked" in recorder.problem
    holder.execute("rollback")
    holder.close()
    recorder.end_run(run, "succeeded")
    recorder.close()
    records = Records(url)
    assert records.run(run)["status"] == "succeeded" and recorder.problem is None and not caplog.records
    records.close()


@pytest.mark.parametrize("again", [False, True])
def test_a_store_that_is_deleted_meanwhile(url, runs, tmp_path, quick, again):
    recorder, records = Recorder(url, runs), Records(url)
    run = recorder.start_run("demo", {"seed": 0}, selection={"tasks": ["b"]})
    recorder.put_task(run, "a", status="skipped")
    recorder.put_task(run, "b", status="executed", reason="b.txt is not there", metrics={"auc": 0.5})
    until(lambda: len(records.tasks(run)) == 2 if records.runs() else False)
    records.close()
    for name in ("records.db", "records.db-wal", "records.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    if again:
        recorder.end_run(run, "succeeded")
        recorder.close()
        assert is_whole(url, run)
    else:  # it goes after the last change
        recorder.close()
        records = Records(url)
        assert [t["status"] for t in records.tasks(run)] == ["skipped", "executed"]
        records.close()
    assert not list(runs.iterdir())


def test_a_store_that_is_deleted_as_soon_as_it_is_written(url, runs, tmp_path, quick, monkeypatch):
    recorder, written = Recorder(url, runs), []

    def put(changes):
        Records.put(recorder._store.records, changes)
        for name in () if written else ("records.db", "records.db-wal", "records.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        written.extend(changes)

    monkeypatch.setattr(recorder._store.records, "put", put)
    run = recorder.start_run("demo", {})
    until(lambda: written)
    recorder.end_run(run, "succeeded")
    recorder.close()
    records = Records(url)
    assert records.run(run)["status"] == "succeeded" and not list(runs.iterdir())
    records.close()


@pytest.mark.parametrize("grace", [0.0, 600.0])
def test_a_process_that_is_killed_leaves_what_it_noted(url, runs, grace):
    code = f"""
import sys, time
from pathlib import Path
from mlnb.pipelines import recorder
recorder.START_DELAY_SECONDS = {grace}
r = recorder.Recorder({url!r}, Path({str(runs)!r}))
run = r.start_run("demo", {{"seed": 0}})
r.put_task(run, "a", status="executed")
r.put_task(run, "b", status="running")
print(run, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        run = process.stdout.readline().strip()
        os.kill(process.pid, signal.SIGKILL)
    records = Records(url)
    until(
        lambda: replay(records, runs) == [run]
    )  # a git that it was just starting may hold the journal a moment longer
    assert replay(records, runs) == []
    assert records.run(run)["status"] == "lost"
    assert [(t["name"], t["status"]) for t in records.tasks(run)] == [("a", "executed"), ("b", "running")]
    records.close()


def test_a_journal_that_was_cut_off(url, runs, caplog):
    run = whole_run(Recorder(url, runs), wait=False)
    journal = runs / run / JOURNAL
    journal.write_bytes(
        b"\xff\xfe garbage\n[1, 2]\n[1]\n" + journal.read_bytes() + b'["task", {"run_id": "' + run.encode()
    )
    caplog.clear()
    records = Records(url)
    assert replay(records, runs) == [run]
    assert is_whole(url, run)
    (said,) = [r.message for r in caplog.records]
    assert "4 damaged lines" in said and not journal.exists() and journal.with_suffix(".damaged").exists()
    assert replay(records, runs) == []
    records.close()


def test_one_change_that_is_refused_holds_nothing_else_up(url, runs, caplog):
    run = whole_run(Recorder(url, runs), wait=False)
    with (runs / run / JOURNAL).open("a") as f:
        f.write(json.dumps(["task", {"run_id": run, "name": "c"}, {"colour": "red"}]) + "\n")
    caplog.clear()
    records = Records(url)
    assert replay(records, runs) == [run] and is_whole(url, run) and "1 damaged lines" in caplog.text
    records.close()


def test_a_folder_that_cannot_be_written(url, runs, tmp_path, caplog):
    runs.write_text("a file stands where the folder should be")
    run = whole_run(Recorder(url, runs))
    assert is_whole(url, run) and not caplog.records
    lost = whole_run(Recorder("sqlite:////proc/none/records.db", runs))
    (said,) = [r.message for r in caplog.records]
    assert f"run {lost} is not recorded" in said and str(runs) in said


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("mount"), reason="needs root on Linux"
)
def test_a_disk_that_is_full(tmp_path, quick):
    (disk := tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        url = f"sqlite:///{disk}/records.db"
        recorder = Recorder(url, disk / "runs")
        run = recorder.start_run("demo", {"seed": 0})
        with (disk / "filling").open("wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
            while True:
                f.write(b"x" * 4096)
        for i in range(200):
            recorder.put_task(run, f"t{i}", status="executed", reason="x" * 200)
        until(lambda: recorder.problem)
        (disk / "filling").unlink()
        recorder.end_run(run, "succeeded")
        recorder.close()
        records = Records(url)
        replay(records, disk / "runs")
        assert records.run(run)["status"] == "succeeded" and len(records.tasks(run)) == 200
        records.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_recorders_and_a_reader_at_once(url, runs):
    code = f"""
import sys
from pathlib import Path
from mlnb.pipelines import recorder
recorder.START_DELAY_SECONDS = 0
for i in range(10):
    with recorder.Recorder({url!r}, Path({str(runs)!r})) as r:
        run = r.start_run("demo", {{"i": i}})
        r.put_task(run, "a", status="executed")
        r.end_run(run, "succeeded")
"""
    writers = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    records = Records(url)
    while any(w.poll() is None for w in writers):
        replay(records, runs)
        records.runs()
        time.sleep(0.01)
    for w in writers:
        assert w.wait() == 0 and w.communicate()[1] == ""
    replay(records, runs)
    assert [r["status"] for r in records.runs(100)] == ["succeeded"] * 30
    assert all(records.tasks(r["id"])[0]["status"] == "executed" for r in records.runs(100)) and not list(
        runs.iterdir()
    )
    records.close()
