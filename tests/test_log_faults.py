"""Workers that are killed, disks that fail: acknowledged rows are logged rows, and none is compacted twice."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from test_compactor import ids_in_parquet
from test_predictions import prediction
from waiting import until

from mlnb.project.errors import ServingError
from mlnb.serving import predictions as p
from mlnb.serving.compactor import Compactor
from mlnb.serving.log_reader import LogReader, read_predictions
from mlnb.serving.predictions import PredictionLog

WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_compactor import columns, prediction
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.predictions import PredictionLog
log = PredictionLog(sys.argv[2], sync=sys.argv[4], rotate_mb=1)
log._files.rotate_bytes = 100_000
number, step = int(sys.argv[3]) * 100_000, 0
while True:
    numbers = range(number, number + 1 + step % 7)
    if step % 3:
        log.append([prediction(i) for i in numbers])
    else:
        log.append_table(columns(numbers))
    print("\\n".join(f"r{i:06}" for i in numbers), flush=True)
    number, step = numbers.stop, step + 1
    time.sleep(0.005)
"""


@pytest.fixture
def workers(tmp_path):
    "Start workers, each of which says which rows it has logged; what is left of them is killed"
    started = []

    def start(number, sync="none"):
        said = (tmp_path / f"said-{number}").open("w")
        command = [sys.executable, "-c", WORKER, os.path.dirname(__file__), str(tmp_path / "log"), str(number), sync]
        started.append(subprocess.Popen(command, stdout=said))
        said.close()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def acknowledged(tmp_path):
    return [line for said in tmp_path.glob("said-*") for line in said.read_text().splitlines() if len(line) == 7]


@pytest.mark.parametrize(
    ("death", "sync"), [(signal.SIGKILL, "none"), (signal.SIGTERM, "interval"), (signal.SIGKILL, "always")]
)
def test_workers_that_are_killed_under_load(tmp_path, workers, death, sync):
    "The compactor works meanwhile and leaves alone what is written to; at the end each row is there once"
    running, compactor = [workers(number, sync) for number in range(3)], Compactor(tmp_path / "log", tmp_path / "parts")
    until(lambda: len(acknowledged(tmp_path)) >= 300, "300 logged rows")
    for process in running:
        compactor.run()
        process.send_signal(death)
        process.wait()
    said = acknowledged(tmp_path)
    found = LogReader(tmp_path / "log", tmp_path / "parts").frame()["request_id"]
    assert found.is_unique and set(said) <= set(found) and len(found) - len(said) <= 3 * 7  # what was in flight
    done = compactor.run()
    assert ids_in_parquet(tmp_path / "parts") == sorted(found) and done.damaged <= 3
    assert not list((tmp_path / "log").glob("*.jsonl")) and not list((tmp_path / "log").glob("*.arrows"))


def test_files_of_a_living_worker_are_left_alone(tmp_path):
    log = PredictionLog(tmp_path / "log")
    log.append([prediction(0)])
    assert Compactor(tmp_path / "log", tmp_path / "parts").run().files == 0
    log.append([prediction(1)])
    log.close()
    assert Compactor(tmp_path / "log", tmp_path / "parts").run().rows == 2


def test_a_file_ends_with_its_size_and_with_its_hour(tmp_path, monkeypatch):
    log = PredictionLog(tmp_path / "log", rotate_mb=1)
    log._files.rotate_bytes = 1000
    now = time.time()
    monkeypatch.setattr(p.time, "time", lambda: now)
    for i in range(10):
        log.append([prediction(i)])
    assert Compactor(tmp_path / "log", tmp_path / "parts").run().rows == 9
    monkeypatch.setattr(p.time, "time", lambda: now + 3600)
    log.check()  # what asks whether the service is ready also ends the file of an idle hour
    assert Compactor(tmp_path / "log", tmp_path / "parts").run().rows == 1


def test_an_empty_file_that_a_worker_is_about_to_lock_may_go(tmp_path, monkeypatch):
    log, compactor = PredictionLog(tmp_path / "log"), Compactor(tmp_path / "log", tmp_path / "parts")
    lock = fcntl.flock

    def late(*arguments):
        monkeypatch.setattr(fcntl, "flock", lock)
        compactor.run()
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    log.append([prediction(0)])
    log.close()
    assert compactor.run().rows == 1


@pytest.mark.parametrize("sync", p.SYNC_MODES)
@pytest.mark.parametrize(
    "first", [lambda log: log.append([prediction(0)]), lambda log: log.check()], ids=["appended", "checked"]
)
def test_a_deleted_folder_comes_again(tmp_path, sync, first):
    log, compactor = PredictionLog(tmp_path / "log", sync), Compactor(tmp_path / "log", tmp_path / "parts")
    first(log)
    shutil.rmtree(tmp_path / "log")
    log.append([prediction(1)])
    log.close()
    assert compactor.run().rows == 1 and ids_in_parquet(tmp_path / "parts") == ["r1"]


@pytest.fixture
def disk(tmp_path):
    "A file system of 64 KB"
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 512)


@pytest.mark.parametrize("sync", p.SYNC_MODES)
def test_a_full_disk_refuses_until_there_is_room(disk, sync, fixed_clock):
    log, logged = PredictionLog(disk / "log", sync), ["r0"]
    log.append([prediction(0)])
    fill(disk)
    for i in range(1, 100):
        try:
            log.append([prediction(i + more) for more in (0, 200, 400)])
            logged += [f"r{i + more}" for more in (0, 200, 400)]
        except ServingError as e:
            assert str(e).endswith("cannot be written: No space left on device")
    with pytest.raises(ServingError):
        log.check()
    (disk / "filler").unlink()
    log.check()
    log.append([prediction(100)])
    log.close()
    table = LogReader(disk / "log").frame()
    assert sorted(table["request_id"]) == sorted([*logged, "r100"]) and table.attrs["torn"] == 0
    assert len(list((disk / "log").iterdir())) == 1


def test_a_full_disk_may_serve_and_says_so(disk, capfd):
    log = PredictionLog(disk / "log", on_failure="serve")
    log.append([prediction(0)])
    for turn in (1000, 2000):
        before = log.unlogged_predictions
        fill(disk)
        for i in range(turn, turn + 150, 3):
            log.append([prediction(i), prediction(i + 1), prediction(i + 2)])
        log.check()
        assert log.unlogged_predictions > before
        (disk / "filler").unlink()
        log.append([prediction(turn + 150)])
    said = capfd.readouterr().err.splitlines()
    assert ["cannot be written: No space left" in line for line in said] == [True, False, True, False]
    assert "is written again" in said[1] and f"; {log.unlogged_predictions} predictions so far" in said[3]
    assert len(LogReader(disk / "log").frame()) == 303 - log.unlogged_predictions


def test_a_full_disk_stops_the_compactor_and_loses_nothing(disk):
    log = PredictionLog(disk / "log")
    for i in range(40):
        log.append([prediction(24 * i)])
    log.close()
    fill(disk)
    with pytest.raises(OSError):
        Compactor(disk / "log", disk / "parts").run()
    assert len(LogReader(disk / "log", disk / "parts").frame()) == 40
    (disk / "filler").unlink()
    assert Compactor(disk / "log", disk / "parts").run().rows == 40 and len(ids_in_parquet(disk / "parts")) == 40


def test_a_read_only_disk(disk, capfd):
    refusing, serving = PredictionLog(disk / "log"), PredictionLog(disk / "other", on_failure="serve")
    for log in (refusing, serving):
        log.append([prediction(0)])
        log.close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(ServingError, match="Read-only file system"):
        refusing.append([prediction(1)])
    with pytest.raises(ServingError, match="Read-only file system"):
        refusing.check()
    serving.append([prediction(1), prediction(2)])
    assert serving.unlogged_predictions == 2 and "Read-only file system" in capfd.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    for log in (refusing, serving):
        log.append([prediction(3)])
    assert len(LogReader(disk / "log").frame()) == len(LogReader(disk / "other").frame()) == 2


@pytest.mark.parametrize(
    "ask", [lambda log: log.append([prediction(1)] * 30), lambda log: log.check()], ids=["append", "check"]
)
def test_a_part_of_a_line_that_cannot_be_cut_off_ends_its_file(disk, monkeypatch, ask, fixed_clock):
    def fails(*arguments):
        raise OSError(5, "Input/output error")

    log = PredictionLog(disk / "log")
    fill(disk)
    with monkeypatch.context() as broken, pytest.raises(ServingError):
        broken.setattr(p.os, "ftruncate", fails)
        while True:
            ask(log)
    (disk / "filler").unlink()
    log.append([prediction(0)])
    assert LogReader(disk / "log").frame()["request_id"].iloc[-1] == "r0" and len(list((disk / "log").iterdir())) == 2


def test_threads_append_one_after_the_other(tmp_path):
    log = PredictionLog(tmp_path)
    log._files.rotate_bytes = 5000

    def work(who):
        for i in range(100):
            log.append([prediction(who * 1000 + i)])

    threads = [p.threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = LogReader(tmp_path).frame()
    assert len(table) == table["request_id"].nunique() == 400 and table.attrs["torn"] == 0


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on its cache")
def test_what_is_on_the_disk_leaves_memory_and_the_page_of_the_end_stays(tmp_path, monkeypatch, fixed_clock):
    released, advise = [], os.posix_fadvise
    monkeypatch.setattr(p.os, "posix_fadvise", lambda number, *what: (released.append(what[:2]), advise(number, *what)))
    log, written = PredictionLog(tmp_path, "always"), 0
    while len(released) < 3:
        log.append([prediction(written + i) for i in range(100)])
        written += 100
    (file,) = tmp_path.iterdir()
    for (begin, size), (following, _) in pairwise(released):
        assert size >= p.RELEASE_BYTES and following == (begin + size) // p.PAGE_BYTES * p.PAGE_BYTES
    assert sum(released[-1]) < file.stat().st_size
    assert read_predictions(tmp_path)["request_id"].nunique() == written


def test_interval_syncs_beside_the_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(p, "SYNC_SECONDS", 0.01)
    synced, sync = [], os.fdatasync
    monkeypatch.setattr(
        p.os, "fdatasync", lambda number: (synced.append(p.threading.current_thread().name), sync(number))
    )
    log = PredictionLog(tmp_path, "interval")
    log._files.rotate_bytes = 1000
    for i in range(20):
        log.append([prediction(i)])
        time.sleep(0.005)
    log.close()
    assert set(synced) == {"mlnb-log-sync"} and len(LogReader(tmp_path).frame()) == 20


def test_a_disk_that_refuses_to_sync_is_not_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(p, "SYNC_SECONDS", 0.01)

    def fails(number):
        raise OSError(5, "Input/output error")

    log = PredictionLog(tmp_path / "a", "always")
    monkeypatch.setattr(p.os, "fdatasync", fails)
    with pytest.raises(ServingError, match="Input/output error"):
        log.append([prediction(0)])
    log = PredictionLog(tmp_path / "b", "interval")
    with pytest.raises(ServingError, match="Input/output error"):
        for i in range(1000):
            log.append([prediction(i)])
            time.sleep(0.002)


def test_a_forked_process_with_a_thread_that_syncs(tmp_path):
    log = PredictionLog(tmp_path, "interval")
    log.append([prediction(0)])
    if not (child := os.fork()):
        log.append([prediction(1)])
        log.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    log.append([prediction(2)])
    log.close()
    assert sorted(LogReader(tmp_path).frame()["request_id"]) == ["r0", "r1", "r2"]
