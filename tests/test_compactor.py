"""The compactor: killed at every step, beside others, beside readers; each row once."""

import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlnb.project.errors import ServingError
from mlnb.serving import compactor as c
from mlnb.serving import part_store
from mlnb.serving.log_damage import count_unreadable, quarantined
from mlnb.serving.log_reader import LogQuery, LogReader
from mlnb.serving.log_records import read_tables, split_by_hour, to_record_batch
from mlnb.serving.part_store import LogPart, LogPartStore
from mlnb.serving.predictions import Prediction, PredictionLog


def prediction(number, version="v1", hour=None):
    at = f"2013-07-01T{number % 3 if hour is None else hour:02}:{number % 60:02}:00Z"
    raw = {"carrier": "UA", "distance": 1400, "departure": "2013-07-01T20:00:00-04:00"}
    seen = {"carrier": "UA", "wind": None if number % 2 else 3.5}
    answer = {"probability": 0.1 + 0.2, "decision": number % 2 == 0}
    return Prediction(f"r{number:06}", f"UA/{number}", at, at, version, "champion", at, 0.5, answer, raw, seen)


def columns(numbers, version="v1", arm="champion"):
    "The same predictions as columns"
    rows = [prediction(n) for n in numbers]
    times = np.array([r.time[:-1] for r in rows], "datetime64[s]")
    own = {
        "request_id": [r.request_id for r in rows],
        "entity": [r.entity for r in rows],
        "time": times,
        "logged_at": times,
    }
    own |= {"model_version": version, "arm": arm, "context_moment": times, "latency_ms": 0.5}
    own |= {"probability": np.full(len(rows), 0.1 + 0.2), "decision": np.array([r.output["decision"] for r in rows])}
    raw = {"carrier": np.full(len(rows), "UA"), "distance": np.full(len(rows), 1400)}
    raw["departure"] = np.full(len(rows), np.datetime64("2013-07-02T00:00:00"))
    wind = np.where(np.array(numbers) % 2, np.nan, 3.5)
    return to_record_batch(
        raw, {"carrier": raw["carrier"], "wind": wind}, **own
    )  # a feature that is an input, and one of its own


def log_files(folder, files, rows=10, start=0, hour=None):
    "Finished files of so many rows each"
    for file in range(files):
        log = PredictionLog(folder)
        log.append([prediction(start + file * rows + i, "v2" if i > 7 else "v1", hour) for i in range(rows)])
        log.close()


def ids_in_parquet(folder):
    "What any other tool would find"
    files = Path(folder).rglob("*.parquet")
    return sorted(i for file in files for i in pq.read_table(file, columns=["request_id"])["request_id"].to_pylist())


def expected(rows):
    return [f"r{i:06}" for i in range(rows)]


@pytest.fixture
def place(tmp_path):
    return tmp_path / "log", tmp_path / "parts"


def test_rows_in_columns_are_the_same_rows(tmp_path):
    for name, append in (
        ("a", lambda log, n: log.append([prediction(i) for i in n])),
        ("b", lambda log, n: log.append_table(columns(n))),
    ):
        log = PredictionLog(tmp_path / name)
        append(log, range(50))
        append(log, range(50, 70))
        log.close()
    rows, batches = (LogReader(tmp_path / name).frame() for name in "ab")
    pd.testing.assert_frame_equal(rows, batches)
    c.Compactor(tmp_path / "b", tmp_path / "parts").run()
    pd.testing.assert_frame_equal(rows, LogReader(tmp_path / "b", tmp_path / "parts").frame())


def test_rows_of_both_kinds_share_their_parts(place):
    log = PredictionLog(place[0])
    log.append([prediction(i) for i in range(20)])
    log.append_table(columns(range(20, 40)))
    log.close()
    before = LogReader(*place).frame()
    assert c.Compactor(*place).run().parts == 3
    pd.testing.assert_frame_equal(before, LogReader(*place).frame(), check_like=True)


def test_late_rows_make_a_further_part(place):
    log_files(place[0], 1)
    c.Compactor(*place).run()
    log_files(place[0], 1, start=10)
    assert c.Compactor(*place).run().rows == 10
    assert len({p.folder for p in LogPartStore(place[1]).parts()}) < len(LogPartStore(place[1]).parts())
    assert ids_in_parquet(place[1]) == expected(20) == LogReader(*place).frame()["request_id"].sort_values().tolist()


def test_small_parts_are_merged_when_they_pile_up(place):
    for i in range(9):
        log_files(place[0], 1, start=10 * i, hour=5)
        c.Compactor(*place).run()
    parts = LogPartStore(place[1]).parts()
    assert {p.version: sum(q.version == p.version for q in parts) for p in parts} == {"v1": 2, "v2": 2}
    assert ids_in_parquet(place[1]) == expected(90)


def test_damaged_and_torn_lines_are_set_aside(place):
    log_files(place[0], 1)
    (file,) = place[0].glob("*.jsonl")
    good = file.read_bytes()
    odd = json.dumps({"request_id": "x", "time": "yesterday"}).encode()
    deep = b"[" * 100_000
    file.write_bytes(b"\x00\xff\n" + good + odd + b"\n" + deep + b"\n" + good[:100])
    done = c.Compactor(*place).run()
    assert (done.rows, done.damaged, done.lost) == (10, 4, 3) and ids_in_parquet(place[1]) == expected(10)
    assert (place[0] / "damaged" / file.name).read_bytes() == b"\x00\xff\n" + odd + b"\n" + deep + b"\n" + good[:100]


def two_batches(folder) -> Path:
    "A finished file of columns with two batches of 20 rows"
    log = PredictionLog(folder)
    log.append_table(columns(range(20)))
    log.append_table(columns(range(20, 40)))
    log.close()
    return max(folder.glob("*.arrows"), key=lambda file: file.stat().st_size)


def in_the_second(data, old, new) -> bytes:
    "Both batches, with bytes of the second exchanged for as many others"
    at = data.index(old, data.rindex(b"r0000"))  # its ids come first
    return data[:at] + new + data[at + len(old) :]


OFFSETS = np.arange(0, 42, 2, np.int32).tobytes()  # of 20 texts of two letters, which the names of versions are
DAMAGES = {
    "no version": lambda data: in_the_second(data, OFFSETS, bytes(len(OFFSETS))),
    "far away": lambda data: in_the_second(data, OFFSETS, OFFSETS[:20] + (2**31 - 9).to_bytes(4, "little") * 16),
    "no text": lambda data: in_the_second(data, b"UA/39", b"UA/\xff\xfe"),
    "no time": lambda data: in_the_second(
        data, np.array("2013-07-01T00:39", "datetime64[us]").tobytes(), b"\xff" * 7 + b"\x7f"
    ),
    "torn": lambda data: data[:-9],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_batch_of_columns_is_set_aside(place, damage, fixed_clock):
    file = two_batches(place[0])
    good = file.read_bytes()
    file.write_bytes(DAMAGES[damage](good))
    assert len(LogReader(*place).frame()) == len(LogReader(*place).newest(40)) == 20
    done = c.Compactor(*place).run()
    assert (done.rows, done.damaged, done.lost) == (20, 1, damage != "torn") and ids_in_parquet(place[1]) == expected(
        20
    )
    assert count_unreadable(place[0]) == quarantined(place[0]) == done.lost
    aside = (place[0] / "damaged" / file.name).read_bytes()
    assert DAMAGES[damage](good).endswith(aside)


@pytest.mark.parametrize("name", ["model_version", "features.wind", "latency_ms"])
def test_a_file_of_other_columns_is_set_aside(place, name, fixed_clock):
    file = two_batches(place[0])
    file.write_bytes(file.read_bytes().replace(name.encode(), name.title().encode()))
    assert len(LogReader(*place).frame()) == 0 and c.Compactor(*place).run().damaged == 1
    assert (place[0] / "damaged" / file.name).exists() and not list(place[0].glob("*.arrows"))


def test_zeros_from_anywhere_on_leave_the_batches_before(place, fixed_clock):
    "What a machine leaves that lost its power before the disk had everything"
    file = two_batches(place[0])
    good = file.read_bytes()
    for start in range(0, len(good), 61):
        file.write_bytes(good[:start] + bytes(len(good) - start))
        damaged = []
        found = [table.num_rows for table in read_tables(file, damaged)]
        assert sum(found) in (0, 20, 40) and (sum(found) == 40 or damaged), start


def test_a_line_without_a_version_is_set_aside(place):
    log = PredictionLog(place[0])
    log.append([prediction(0), prediction(1, version="")])
    log.close()
    done = c.Compactor(*place).run()
    assert (done.rows, done.damaged) == (1, 1) and ids_in_parquet(place[1]) == expected(1)


def test_a_large_log_is_compacted_some_rows_at_a_time(place, monkeypatch):
    monkeypatch.setattr(c, "_CHUNK_ROWS", 40)
    log_files(place[0], 10, rows=15)
    steps = []
    done = c.Compactor(*place).run(lambda so_far: steps.append(so_far.rows))
    assert done.rows == 150 and len(steps) > 3 and steps == sorted(steps) and ids_in_parquet(place[1]) == expected(150)


def test_columns_whose_types_do_not_agree(place):
    log = PredictionLog(place[0])
    for value in (1, 2.5, "three", {"four": [4]}, None, 2**70):
        row = prediction(0)
        row.request_id, row.input = str(value), {"odd": value}
        log.append([row])
        log.close()
    before = LogReader(*place).frame()
    assert c.Compactor(*place).run().rows == 6 and len(LogReader(*place).frame()) == len(before) == 6


@pytest.mark.parametrize("version", ["a/b=c d", "ü%2F..", ".."])
def test_any_name_of_a_version_is_a_folder(place, version):
    log = PredictionLog(place[0])
    log.append([prediction(0, version)])
    log.close()
    c.Compactor(*place).run()
    (part,) = LogPartStore(place[1]).parts()
    assert part.version == version and len(LogReader(*place).frame(LogQuery(version=version))) == 1


def test_two_at_once_exclude_each_other(place):
    log_files(place[0], 1)
    one, other = c.Compactor(*place), c.Compactor(*place)
    with c._compactor_lock(one.folder), pytest.raises(ServingError, match="is being compacted by another process"):
        other.run()
    assert other.run().rows == 10


def test_old_parts_expire_by_hour_and_by_age(place):
    log_files(place[0], 1)
    compactor = c.Compactor(*place, retention_days=30)
    assert compactor.run().expired == 0  # old decisions, logged a moment ago
    for part in compactor.store.parts():
        past = f"{datetime.now(UTC) - timedelta(days=31):{part_store.STAMP_FORMAT}}"
        Path(part.path).rename(part.path.replace(part.stamp, past))
    log_files(place[0], 1, start=10)
    assert compactor.run().expired > 0 and ids_in_parquet(place[1]) == expected(20)[10:]


def part(hour: str, stamp: str = ""):
    "A part of an hour of decisions, compacted on a day, by default that of the decisions"
    return LogPart(
        f"version=v/hour={hour}/{stamp}",
        1,
        "v",
        hour,
        "a" * 8,
        f"{stamp or hour[:10].replace('-', '')}T130000000000",
        "00000",
    )


def days(first: str, number: int) -> list[str]:
    return [str(np.datetime64(first) + i) for i in range(number)]


YEAR = days("2026-01-01", 365)
NOW = "20261230"  # when all of a replay was compacted


@pytest.mark.parametrize(
    ("parts", "gone", "later"),
    [
        pytest.param([part(f"{day}T05") for day in YEAR], YEAR[:36], 328, id="a year of traffic"),
        pytest.param(
            [part(f"{day}T05", NOW) for day in YEAR], YEAR[:36], 328, id="a year of decisions compacted on one day"
        ),
        pytest.param(
            [*(part(f"{day}T05") for day in YEAR), part("2028-01-01T05")],
            YEAR[:36],
            329,
            id="the service goes on under the wrong clock",
        ),
        pytest.param(
            [*(part(f"{day}T05") for day in YEAR), part("2199-01-01T05", NOW)],
            YEAR[:36],
            328,
            id="a decision far ahead",
        ),
        pytest.param([part(f"{day}T05") for day in YEAR[:3]], YEAR[:1], 1, id="three days"),
        pytest.param([part(f"{YEAR[0]}T{hour:02}") for hour in range(24)], [], 0, id="one day"),
        pytest.param([], [], 0, id="nothing"),
        pytest.param([part("2027-12-31T05"), part("2028-01-01T05")], [], 0, id="nothing old"),
    ],
)
def test_a_wrong_clock_removes_a_tenth_of_the_days_and_never_the_newest(parts, gone, later):
    old, rest = part_store.expired(parts, datetime(2027, 12, 1, tzinfo=UTC))
    assert sorted({p.hour[:10] for p in old}) == gone and rest == later


@pytest.mark.parametrize("ahead", [366, 36_600, -36_600])
def test_a_pass_by_a_wrong_clock_is_logged(place, monkeypatch, caplog, ahead):
    log, rows = PredictionLog(place[0]), [prediction(i) for i in range(23)]
    log.append([msgspec.structs.replace(row, time=f"2013-07-{day:02}T05:00:00Z") for day, row in enumerate(rows, 1)])
    log.close()
    c.Compactor(*place).run()

    class Wrong(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) + timedelta(days=ahead)

    monkeypatch.setattr(part_store, "datetime", Wrong)
    for _ in range(2):
        assert c.Compactor(*place, retention_days=30).run().expired == (2 if ahead > 0 else 0)
    assert ids_in_parquet(place[1]) == expected(23)[4 if ahead > 0 else 0 :]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (2 if ahead > 0 else 0)
    assert all(
        "2 parts of 2 days were removed; this clock says" in text and "more days follow" in text for text in said
    )


def test_parts_may_be_in_any_file_system(place):
    log_files(place[0], 9, hour=5)
    url = f"memory://{place[0].name}-{id(place)}"
    c.Compactor(place[0], url).run()
    frame = LogReader(place[0], url).frame(LogQuery(entity="UA/7"))
    assert frame["request_id"].tolist() == ["r000007"] and not list(place[0].glob("*.jsonl"))


def test_readers_beside_writers_and_compactor(place):
    "Whenever one looks: every acknowledged row, none twice"
    ended, acknowledged, problems = threading.Event(), [], []

    def write():
        log = PredictionLog(place[0])
        while not ended.is_set():
            start = len(acknowledged)
            log.append([prediction(i, hour=5) for i in range(start, start + 20)])
            acknowledged.extend(range(start, start + 20))
            log.close()
            ended.wait(0.01)

    def compact():
        while not ended.is_set():
            c.Compactor(*place).run()
            ended.wait(0.005)

    def watched(work):
        try:
            work()
        except Exception as e:
            problems.append(e)

    threads = [threading.Thread(target=watched, args=(work,)) for work in (write, compact)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            least = len(acknowledged)
            found = LogReader(*place).frame()["request_id"]
            assert found.is_unique and len(found) >= least
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    c.Compactor(*place).run()
    assert not problems and ids_in_parquet(place[1]) == expected(len(acknowledged))


def test_a_reader_that_looks_again_gives_the_compactor_time(place, monkeypatch):
    waits, left = [], [8]
    monkeypatch.setattr(part_store.time, "sleep", waits.append)

    def work(snapshot):
        left[0] -= 1
        if left[0] >= 0:
            raise FileNotFoundError
        return "read"

    assert (
        LogReader(*place).with_retries(work) == "read"
        and len(waits) == 8
        and waits == sorted(waits)
        and waits[0] < waits[-1]
    )
    left[0] = 1000
    with pytest.raises(ServingError, match="changes faster than it can be read"):
        LogReader(*place).with_retries(work)


EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import pandas, pyarrow.dataset, pyarrow.parquet, pyarrow.compute
import test_compactor as t
from mlnb.serving import compactor as c
from mlnb.serving import part_store
from mlnb.serving.log_reader import LogReader
c._MERGE_MIN_PARTS = 3
root = Path({root!r})
STEPS = {{"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}}

def forked(work):
    "The signal or exit code with which a child ends that does this"
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as e:
            print(repr(e), flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(last=None):
    left = [last]
    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in STEPS or writes) and str(root) in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    if last is not None:
        sys.addaudithook(hook)
    c.Compactor(root / "log", root / "parts").run()

def recover():
    found = sorted(LogReader(root / "log", root / "parts").frame()["request_id"])
    assert found == t.expected(40), ("a reader finds", len(found))
    run()
    assert t.ids_in_parquet(root / "parts") == t.expected(40), len(t.ids_in_parquet(root / "parts"))
    assert list(root.rglob("*-merged.parquet")) and not list((root / "parts").rglob("*.part"))
    assert not [f for f in (root / "log").rglob("*") if f.suffix in (".jsonl", ".arrows")]

def begin():
    "Two parts of one hour are there, a file of lines and one of columns are to come; then there is something to merge"
    shutil.rmtree(root, ignore_errors=True)
    for i in range(2):
        t.log_files(root / "log", 1, rows=8, start=8 * i, hour=1)
        c.Compactor(root / "log", root / "parts").run()
    t.log_files(root / "log", 1, rows=8, start=16, hour=1)
    log = t.PredictionLog(root / "log")
    log.append_table(t.columns(range(24, 40)))
    log.close()

assert forked(begin) == 0
shutil.copytree(root, kept := root.with_name("kept"))
step = 0
while True:
    shutil.rmtree(root)
    shutil.copytree(kept, root)
    ends = [forked(lambda: run(step)) for _ in range(1 + step % 2)]
    assert forked(recover) == 0, step
    if ends[0] == 0:
        break
    assert ends[0] == -signal.SIGKILL, ends
    step += 1
print(step, "steps")
"""


def test_killed_at_every_step(tmp_path):
    "kill -9 at each change of the file system, at every other one twice: readers and Parquet have each row once"
    code = EVERY_STEP.format(tests=str(Path(__file__).parent), root=str(tmp_path / "place"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 25


def test_rows_that_stand_twice_stay_once(place):
    "Whole batches again, from another process; a row of another arm is another row, one of another moment counts once"
    for _ in range(2):
        log = PredictionLog(place[0])
        log.append([prediction(i, hour=5) for i in range(20)])
        log.append_table(columns(range(40, 60)))
        log.close()
    other = prediction(0, hour=5)
    other.arm = "shadow"
    late = prediction(1, hour=5)
    late.time = "2013-07-01T05:59:00Z"
    log = PredictionLog(place[0])
    log.append([other, late])
    log.close()
    before = [LogReader(*place).frame(), LogReader(*place).newest(30), LogReader(*place).newest(90)]
    assert [len(rows) for rows in before] == [41, 30, 41]
    done = c.Compactor(*place).run()
    assert (done.rows, done.duplicates) == (42, 40)
    assert before[0].equals(LogReader(*place).frame()) and before[1].equals(LogReader(*place).newest(30))
    assert ids_in_parquet(place[1]) == sorted(["r000000", "r000001", *expected(20), *expected(60)[40:]])


def test_rows_that_stand_in_two_parts_stay_once_when_those_are_merged(place):
    for i in range(9):
        log_files(place[0], 1, start=10 * (i % 8), hour=5)
        c.Compactor(*place).run()
    assert len(ids_in_parquet(place[1])) in (80, 90)
    for i in range(9):
        log_files(place[0], 1, start=100 + 10 * i, hour=5)
        c.Compactor(*place).run()
    assert ids_in_parquet(place[1]).count("r000005") == 1


def test_a_folder_that_cannot_be_written_is_said():
    "To somebody who is not root; what is there stays as it is"
    code = """
import os, sys
sys.path.insert(0, sys.argv[3])
import pandas, pyarrow.dataset, pyarrow.parquet
from mlnb.project.errors import ServingError
from mlnb.serving.compactor import Compactor
from mlnb.serving.log_reader import LogReader
import test_compactor
from tempfile import TemporaryDirectory
with TemporaryDirectory() as other:  # what is imported late, somebody else may not be allowed to read
    test_compactor.log_files(other + "/log", 1)
    Compactor(other + "/log", other + "/parts").run()
    LogReader(other + "/log", other + "/parts").frame()
if not os.getuid():
    os.setuid(65534)
try:
    Compactor(*sys.argv[1:3]).run()
except ServingError as e:
    print(e)
print(len(LogReader(*sys.argv[1:3]).frame()))
"""
    with TemporaryDirectory() as folder:  # that of pytest is for its user alone
        log = Path(folder) / "log"
        log_files(log, 1)
        Path(folder).chmod(0o755)
        log.chmod(0o555)
        arguments = [str(log), f"{folder}/parts", str(Path(__file__).parent)]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        log.chmod(0o755)
    assert "cannot be compacted by this process" in done.stdout and done.stdout.endswith("\n10\n"), (
        done.stdout + done.stderr
    )


def fails_at(name, monkeypatch):
    "A disk that cannot read a folder of this name"
    scandir = os.scandir

    def refuses(path):
        if os.path.basename(path) == name:
            raise OSError(5, "Input/output error", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)


@pytest.mark.parametrize("folder", ["parts", "version=v2", "hour=2013-07-01T05"])
def test_parts_that_cannot_be_listed_are_not_none(place, monkeypatch, folder):
    log_files(place[0], 1, hour=5)
    c.Compactor(*place).run()
    fails_at(folder, monkeypatch)
    for ask in (LogReader(*place).frame, LogPartStore(place[1]).parts, c.Compactor(*place).run):
        with pytest.raises(ServingError, match=f"cannot be read: .*Input/output error: '.*{folder}'"):
            ask()


def test_beside_the_real_server(toy, tmp_path):
    "Callers ask, workers are killed, the compactor runs again and again: each acknowledged answer is there, once"
    import toy_project
    from uvicorn_process import Callers, run_server, workers

    from mlnb.serving import log_profiles as p

    log, parts, profiles = (tmp_path / name for name in ("log", "parts", "profiles"))
    served = run_server(toy, log, "--workers", "2", MLNB_LOG_COMPACT_MINUTES="0")
    with served as (process, url), Callers(url, toy_project.example(toy)) as callers:
        for _ in range(3):
            callers.wait_for(100)
            workers(process)[0].kill()  # its file is finished
            c.Compactor(log, parts).run()
            p.profile_log(log, profiles, parts, lines=False)
            assert LogReader(log, parts).frame()["request_id"].is_unique
    c.Compactor(log, parts).run()
    p.profile_log(log, profiles, parts)
    found = ids_in_parquet(parts)
    assert len(found) == len(set(found)) and set(callers.acknowledged) <= set(found)
    assert p.LogProfileStore(profiles).merged().rows == len(found)


def test_no_rows_are_of_no_hour():
    texts, times = pa.array([], pa.string()), pa.array([], pa.timestamp("us", "UTC"))
    assert list(split_by_hour(pa.table({"time": times, "entity": texts, "request_id": texts}))) == []
