"""Profiles of the log: whatever was killed, whoever else is at work, each hour holds each of its rows once."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_compactor import columns, fails_at, log_files, prediction

from mlnb.data.hourly_profiles import HourlyProfile
from mlnb.project.errors import ProfileError, ServingError
from mlnb.project.settings import Settings
from mlnb.serving import log_profiles as p
from mlnb.serving.compactor import Compactor
from mlnb.serving.part_store import LogPartStore
from mlnb.serving.predictions import PredictionLog


@pytest.fixture
def places(tmp_path):
    "Of the log, of its profiles, of its parts"
    return tmp_path / "log", tmp_path / "profiles", tmp_path / "parts"


def log_hours(folder, hours, rows=20, start=0, version="v1", arm="champion", **raw):
    log = PredictionLog(folder)
    for hour in hours:
        found = [prediction(start + i, version) for i in range(rows)]
        for i, row in enumerate(found):
            row.time, row.arm, row.input = (
                f"{hour}:{i % 60:02}:00Z",
                arm,
                row.input | {k: v[i % len(v)] for k, v in raw.items()},
            )
        log.append(found)
    log.close()


def rows_of(places, **what) -> dict[str, int]:
    return {hour: profile.rows for hour, profile in p.LogProfileStore(places[1]).windows(window="hour", **what).items()}


def same(one: dict, other: dict) -> bool:
    return {k: v.to_bytes() for k, v in one.items()} == {k: v.to_bytes() for k, v in other.items()}


def test_one_profile_an_hour_written_once(places):
    hours = ["2013-07-04T05", "2013-07-04T06", "2013-08-01T00"]
    log_hours(places[0], hours)
    assert p.profile_log(*places) == hours and p.profile_log(*places) == []
    store = p.LogProfileStore(places[1])
    assert store.hours() == hours and store.hours("2013-07") == hours[:2] and store.hours("2014") == []
    assert store.merged("2013-07").rows == 40 and store.merged("2014").columns == {}
    assert store.read(hours[0]).columns["carrier"].frequent()[0] == {"UA": 20}
    with pytest.raises(ProfileError, match="no profile of hour '2013-07-04T07'"):
        store.read("2013-07-04T07")


def test_only_hours_that_grew_are_made_again(places):
    log_hours(places[0], ["2013-07-04T05", "2013-07-04T06"])
    p.profile_log(*places)
    log_hours(places[0], ["2013-07-04T06", "2013-07-04T07"], rows=7, start=100)
    assert p.profile_log(*places) == ["2013-07-04T06", "2013-07-04T07"]
    assert list(rows_of(places).values()) == [20, 27, 7]


def test_versions_and_arms_are_kept_apart(places):
    hour = ["2013-07-04T05"]
    log_hours(places[0], hour, rows=20)
    log_hours(places[0], hour, rows=5, version="v/2", arm="challenger")
    log_hours(places[0], hour, rows=20, version="v/2", arm="shadow")
    log_hours(places[0], ["2013-07-04T06"], rows=3, version="v/2", arm="shadow")
    p.profile_log(*places)
    asked = [{}, {"version": "v/2"}, {"arm": "shadow"}, {"version": "v1", "arm": "shadow"}, {"arm": "challenger"}]
    assert [sum(rows_of(places, **what).values()) for what in asked] == [25, 5, 23, 0, 5]
    store = p.LogProfileStore(places[1])
    assert store.hours() == hour and len(store.hours(arm="shadow")) == 2 and store.merged("2013-07-04T06").rows == 0


def test_versions_in_one_file_of_columns_are_kept_apart(places):
    "As a process leaves it that answers a split, or has swapped its model: before the file is compacted and after"
    log = PredictionLog(places[0])
    log.append_table(columns(range(20)))
    log.append_table(columns(range(20, 32), "v2", "challenger"))
    for finish in (lambda: None, lambda: (log.close(), Compactor(places[0], places[2]).run())):
        finish()
        p.profile_log(*places)
        found = [
            sum(rows_of(places, version=version, arm=arm).values())
            for version in ("v1", "v2")
            for arm in ("champion", "challenger")
        ]
        assert found == [20, 0, 0, 12]


def test_segments_of_the_log(places):
    hours = ["2013-07-04T05", "2013-07-05T06", "2013-07-06T06"]
    log_hours(places[0], hours, rows=30, origin=["JFK", "EWR", None], gate=list(range(90)))
    assert p.profile_log(*places) == hours
    assert p.profile_log(*places, group_by=("origin", "nowhere", "gate")) == hours  # the setting changed
    assert p.profile_log(*places, group_by=("origin", "nowhere", "gate")) == []
    assert sum(rows_of(places).values()) == 90
    for value in ("JFK", "EWR", None):
        assert list(rows_of(places, segment=("origin", value)).values()) == [10, 10, 10]
    assert p.LogProfileStore(places[1]).merged(segment=("origin", "JFK")).columns["origin"].frequent()[0] == {"JFK": 30}
    assert rows_of(places, segment=("origin", "LGA")) == {} and sum(rows_of(places, segment=("gate", 7)).values()) == 3


def test_many_and_long_segments_are_bounded(places):
    log_hours(places[0], ["2013-07-04T05"], rows=200, tail=[f"{i}-{'x' * 300}" for i in range(200)])
    p.profile_log(*places, group_by=("tail",))
    folders = [path for path in places[1].rglob("*.profile") if "by=tail" in str(path)]
    assert len(folders) == 51 and rows_of(places, segment=("tail", p.OTHER)) == {"2013-07-04T05": 150}


def test_days_and_months_say_what_their_hours_say(places):
    hours = [f"2013-{month:02}-{day:02}T{hour:02}" for month in (5, 6, 7) for day in (1, 2, 3) for hour in (1, 2)]
    log_hours(places[0], hours)
    log_hours(places[0], hours[:3], rows=4, arm="shadow")
    p.profile_log(*places)
    assert len(list(places[1].rglob("2013-05.profile"))) == 2 and not list(places[1].rglob("2013-07.profile"))
    assert not list(places[1].rglob("2013-07-03.profile")) and len(list(places[1].rglob("2013-07-02.profile"))) == 1
    store = p.LogProfileStore(places[1])
    assert store.merged().rows == 360 and store.merged("2013-05").rows == 120 and store.merged("2013-05-01").rows == 40
    assert [w.rows for w in store.windows(window="month").values()] == [120, 120, 120] and len(
        store.windows(window="day")
    ) == 9
    log_hours(places[0], hours[:1], rows=7, start=500)  # late
    assert p.profile_log(*places) == hours[:1]
    assert store.merged().rows == 367 and store.merged("2013-05").rows == 127 and store.merged(arm="shadow").rows == 12
    for path in list(places[1].rglob("2013-*T*.profile")):
        if "2013-05" in path.name:
            path.unlink()
    assert store.merged("2013-05").rows == 127  # a month is one file


def figures(hourly: HourlyProfile) -> dict:
    table = zip(hourly.hours, hourly.rows, *vars(hourly.columns["distance"]).values(), strict=True)
    return {str(hour): tuple(values) for hour, *values in table}


def test_hours_of_a_period_are_those_of_its_rows(places):
    "Of what is not put together yet, of days and of months, of several versions and of a segment"
    hours = [f"2013-{month:02}-{day:02}T{hour:02}" for month in (5, 6, 7) for day in (1, 2) for hour in (1, 2)]
    log_hours(places[0], hours, origin=["JFK", "EWR"], distance=[100, 200])
    log_hours(places[0], hours[::3], rows=5, version="v2", arm="challenger", origin=["JFK"], distance=[800])
    p.profile_log(*places, group_by=("origin",))
    store = p.LogProfileStore(places[1])
    found = figures(store.hourly())
    assert list(found) == hours and found[hours[1]] == (20, 20, 150, 0) and found[hours[0]] == (25, 25, 280, 0)
    assert figures(store.hourly("2013-05-01")) == {hour: found[hour] for hour in hours[:2]}
    assert figures(store.hourly("2013-06", "v2")) == {hour: (5, 5, 800, 0) for hour in hours[::3] if "-06-" in hour}
    assert set(figures(store.hourly("2013", segment=("origin", "EWR"))).values()) == {(10, 10, 200, 0)}
    assert not len(store.hourly("2014").hours)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"WHY1")], ids=["gone", "damaged"])
def test_hours_that_are_not_beside_a_month_are_read_one_by_one(places, damage):
    "As an earlier release left it"
    hours = [f"2013-{month:02}-{day:02}T01" for month in (5, 6, 7) for day in (1, 2)]
    log_hours(places[0], hours)
    p.profile_log(*places)
    before = figures(p.LogProfileStore(places[1]).hourly())
    files = sorted(places[1].rglob("*.hourly"), key=lambda file: file.stem)
    assert [file.stem for file in files] == [
        "2013-05",
        "2013-05-01",
        "2013-05-02",
        "2013-06",
        "2013-06-01",
        "2013-06-02",
        "2013-07-01",
    ]
    for file in files:
        damage(file)
    assert figures(p.LogProfileStore(places[1]).hourly()) == before
    log_hours(places[0], ["2013-05-01T01"], rows=5, start=100)
    p.profile_log(*places)
    assert figures(p.LogProfileStore(places[1]).hourly())["2013-05-01T01"][0] == 25


def test_what_went_takes_its_hours_along(places, fixed_clock):
    log_hours(places[0], ["2013-07-04T05"])
    p.profile_log(*places)
    log_hours(places[0], ["2013-07-04T05", "2013-07-04T06"], rows=3)
    p.profile_log(*places)
    newest = max(places[0].glob("*.jsonl"), key=lambda f: len(p._hours_of_file(f)))
    newest.unlink()
    p.profile_log(*places)
    assert rows_of(places) == {"2013-07-04T05": 20} and not list(places[1].rglob("2013-07-04T06.profile"))


def test_what_expired_takes_its_days_and_months_along(places):
    "Also those of a version that has nothing left in a day, and a month that is the last one now"
    log_hours(
        places[0],
        ["2013-05-01T05", "2013-05-02T05", "2013-06-01T05", "2013-06-02T05", "2013-06-03T05", "2013-07-01T05"],
    )
    log_hours(places[0], ["2013-06-01T06"], start=100, version="v2")
    Compactor(places[0], places[2]).run()
    p.profile_log(*places)
    names = lambda: sorted(path.name.partition(".")[0] for path in places[1].rglob("*.profile"))
    assert {"2013-05", "2013-05-02", "2013-06", "2013-06-03"} <= set(names()) and names().count("2013-06") == 2
    for part in LogPartStore(places[2]).parts():
        if part.hour < "2013-06" or part.hour > "2013-07" or part.version == "v2":
            Path(part.path).unlink()
    p.profile_log(*places)
    assert names() == ["2013-06-01", "2013-06-01T05", "2013-06-02", "2013-06-02T05", "2013-06-03T05"]
    assert p.LogProfileStore(places[1]).merged().rows == 60


def test_segments_that_nobody_wants_any_more_go(places):
    log_hours(places[0], ["2013-07-04T05", "2013-07-05T05"])
    p.profile_log(*places, group_by=("carrier",))
    assert len(list(places[1].rglob("by=carrier/*/*.profile"))) == 3
    p.profile_log(*places)
    assert not list(places[1].rglob("by=carrier/*/*.profile")) and list(rows_of(places).values()) == [20, 20]


@pytest.mark.parametrize("damage", [b'{"torn', b"", b"[]", b'{"hours": 3}', b'{"what": 1}', b"\xff\xfe"])
def test_a_damaged_list_costs_one_reading(places, damage):
    log_hours(places[0], ["2013-07-04T05"])
    p.profile_log(*places)
    (places[1] / "log.json").write_bytes(damage)
    assert p.profile_log(*places) == ["2013-07-04T05"] and rows_of(places) == {"2013-07-04T05": 20}


def test_parts_that_cannot_be_listed_cost_no_profile(places, monkeypatch):
    log_files(places[0], 1)
    Compactor(places[0], places[2]).run()
    hours = p.profile_log(*places)
    with monkeypatch.context() as broken, pytest.raises(ServingError, match="Input/output error"):
        fails_at("version=v1", broken)
        p.profile_log(*places)
    assert p.profile_log(*places) == [] and list(rows_of(places)) == hours


def test_a_profile_that_is_gone_is_said(places):
    log_hours(places[0], ["2013-07-04T05"])
    p.profile_log(*places)
    next(places[1].rglob("*.profile")).unlink()
    with pytest.raises(ProfileError, match=r"log\.json to have all made again"):
        p.LogProfileStore(places[1]).merged()


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b"\x00" * path.stat().st_size)], ids=["gone", "damaged"]
)
def test_a_profile_that_is_needed_and_gone_is_made_again(places, damage):
    hours = ["2013-07-04T05", "2013-07-04T06", "2013-07-05T05"]
    log_hours(places[0], hours)
    p.profile_log(*places)
    damage(next(places[1].rglob("2013-07-04T06.profile")))
    log_hours(places[0], hours[:1], rows=7, start=100)  # late: the day is put together again
    assert p.profile_log(*places) == hours and p.profile_log(*places) == []
    assert (
        list(rows_of(places).values()) == [27, 20, 20] and p.LogProfileStore(places[1]).merged("2013-07-04").rows == 47
    )


def test_the_log_is_read_no_more_once_it_is_profiled(places):
    log_hours(places[0], ["2013-07-04T05"])
    p.profile_log(*places)
    (file,) = places[0].glob("*.jsonl")
    file.write_bytes(b"x" * file.stat().st_size)  # of the same length: nobody looks inside
    assert p.profile_log(*places) == [] and rows_of(places) == {"2013-07-04T05": 20}


def test_a_torn_last_line_waits_for_its_end(places):
    log_hours(places[0], ["2013-07-04T05"])
    (file,) = places[0].glob("*.jsonl")
    with file.open("ab") as torn:
        torn.write(b'{"request_id": "r9')
    assert p.profile_log(*places) == ["2013-07-04T05"] and rows_of(places) == {"2013-07-04T05": 20}


def test_compacting_changes_no_profile(places):
    log_files(places[0], 3, rows=15)
    p.profile_log(*places)
    before = p.LogProfileStore(places[1]).windows(window="hour")
    Compactor(places[0], places[2]).run()
    assert p.profile_log(*places, lines=False) == list(before)  # their rows are elsewhere now
    assert same(before, p.LogProfileStore(places[1]).windows(window="hour"))


def test_rows_that_were_logged_twice_count_once(places):
    "Of lines, and of a part and lines"
    for compacted in (False, True):
        for _ in range(2):
            log_hours(places[0], ["2013-07-04T05"])
        p.profile_log(*places)
        assert rows_of(places) == {"2013-07-04T05": 20}, compacted
        Compactor(places[0], places[2]).run()


def test_a_file_that_is_still_written_does_not_wake_the_compactor(places):
    log_hours(places[0], ["2013-07-04T05"])
    assert p.profile_log(*places, lines=False) == [] and p.profile_log(*places) == ["2013-07-04T05"]
    log_hours(places[0], ["2013-07-04T05"], start=100)
    assert p.profile_log(*places, lines=False) == [] and p.profile_log(*places) == ["2013-07-04T05"]
    assert rows_of(places) == {"2013-07-04T05": 40}


def test_profiles_may_be_in_any_file_system(places):
    log_hours(places[0], ["2013-07-04T05", "2013-07-05T05"])
    url = f"memory://{places[0].name}-{id(places)}"
    assert len(p.profile_log(places[0], url)) == 2 and p.LogProfileStore(url).merged().rows == 40
    assert p.profile_log(places[0] / "none", f"{url}/none") == [] and p.LogProfileStore(f"{url}/none").hours() == []


def test_two_processes_may_profile_at_once(places):
    log_hours(places[0], [f"2013-07-{day:02}T{hour:02}" for day in (1, 2, 3) for hour in range(0, 24, 2)])
    code = "import sys; from mlnb.serving.log_profiles import profile_log; print(len(profile_log(*sys.argv[1:])))"
    command = [sys.executable, "-c", code, *map(str, places)]
    running = [subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(int(process.communicate()[0]) for process in running) == [0, 36]  # the second waited for the first
    assert p.LogProfileStore(places[1]).merged().rows == 720 and p.profile_log(*places) == []


def test_readers_beside_writer_compactor_and_profiler(places):
    "Whenever one looks: no row twice, and after an update no acknowledged row missing"
    ended, problems, acknowledged = threading.Event(), [], [0]

    def write():
        while not ended.is_set():
            log_hours(places[0], ["2013-07-04T05", "2013-07-05T05"], rows=10, start=acknowledged[0])
            acknowledged[0] += 20
            ended.wait(0.01)

    def compact():
        while not ended.is_set():
            Compactor(places[0], places[2]).run()
            p.profile_log(*places, lines=False)
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
            least = acknowledged[0]
            p.profile_log(*places)
            found = p.LogProfileStore(places[1]).merged().rows
            assert least <= found <= acknowledged[0] + 20
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    p.profile_log(*places)
    assert not problems and p.LogProfileStore(places[1]).merged().rows == acknowledged[0]


def test_machines_that_share_a_storage_have_profiles_of_their_own(tmp_path):
    shared = str(tmp_path / "shared")
    settings = [
        Settings(root=tmp_path / name, name=name, storage=shared, profile_segments=("carrier",))
        for name in ("one", "two")
    ]
    for number, one in enumerate(settings):
        log_hours(one.path(one.predictions), ["2013-07-04T05"], start=100 * number)
    done = [p.compact_and_profile(one) for one in settings]
    assert [(d.rows, d.profiled) for d in done] == [(20, 1), (20, 1)] and p.update_profiles(settings[0]) == [
        "2013-07-04T05"
    ]
    stores = [p.LogProfileStore(p.profiles_url(one)) for one in settings]
    assert [store.merged().rows for store in stores] == [40, 40]
    assert stores[0].merged(segment=("carrier", "UA")).rows == 40


EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import pandas, pyarrow.dataset, pyarrow.parquet, pyarrow.compute
import test_log_profiles as t
from mlnb.serving.compactor import Compactor
from mlnb.serving.part_store import LogPartStore
from mlnb.serving import log_profiles as p
from mlnb.data import sketches
sketches.whylogs_messages()  # imported once, not in every child
os.fsync = lambda number: None  # a kill loses nothing that was written
root = Path({root!r})
places = root / "log", root / "profiles", root / "parts"
STEPS = {{"os.rename", "os.remove", "os.mkdir", "os.rmdir"}}
HOURS = ["2013-06-01T05", "2013-06-02T05", "2013-07-01T05", "2013-07-02T05"]

def forked(work):
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as e:
            print(repr(e), flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def update():
    p.profile_log(*places, group_by=("carrier",))

def run(last):
    left = [last]
    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in STEPS or writes) and str(root) in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    update()

def begin():
    "Four hours of two months are profiled; then one is compacted, one gets late rows, one is new"
    t.log_hours(places[0], HOURS[:3])
    Compactor(places[0], places[2]).run()
    update()
    t.log_hours(places[0], HOURS[2:], rows=6, start=100)
    t.log_hours(places[0], HOURS[:1], rows=5, start=200)

def recover():
    store = p.LogProfileStore(places[1])
    assert 60 <= store.merged().rows <= 77 and store.merged("2013-06").rows in (40, 45)
    update()
    assert store.merged().rows == 77 and store.merged("2013-06").rows == 45
    assert store.merged(segment=("carrier", "UA")).rows == 77
    assert [w.rows for w in store.windows(window="hour").values()] == [25, 20, 26, 6]
    assert [w.rows for w in store.windows(window="day").values()] == [25, 20, 26, 6]
    update()

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
    step += 1
print(step, "steps")
"""


@pytest.mark.long
def test_killed_at_every_step(tmp_path):
    "kill -9 at each change of the file system, at every other one twice"
    (root := tmp_path / "place").mkdir()
    code = EVERY_STEP.format(tests=str(Path(__file__).parent), root=str(root))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 25


def test_the_list_is_small(places):
    "It is read by every question: a number a place and hour"
    log_hours(places[0], [f"2013-07-{day:02}T{hour:02}" for day in range(1, 11) for hour in range(24)], rows=2)
    p.profile_log(*places)
    found = json.loads((places[1] / "log.json").read_text())
    assert len(found["hours"]) == 240 and len(json.dumps(found["hours"])) < 30 * 240


def test_places_of_a_thousand_hours_are_found_by_their_name(places):
    "Fifty new segments an hour; those that are gone leave the list"
    found, store = p._ProfileIndex(["tail"]), p.LogProfileStore(places[1])
    hours = [f"2013-{1 + i // 600:02}-{1 + i % 600 // 24:02}T{i % 24:02}" for i in range(1200)]
    calls = 0

    class Place(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal calls
            calls += 1
            return str.__eq__(self, other)

    for i, hour in enumerate(hours):
        found.set_hour(hour, [Place(f"version=v1/arm=champion/by=tail/is=N{i * 50 + n}") for n in range(50)])
    assert calls < 2 * len(found.partitions) == 120_000
    for hour in hours[:-2]:
        found.set_hour(hour, [])
    found.partitions[:] = map(str, found.partitions)  # JSON has no subclasses of str
    store._write_index(found)
    kept = store._read_index()
    assert len(kept.partitions) == 100 and kept.hours.keys() == set(hours[-2:])
    assert {kept.partitions[n] for n in kept.hours[hours[-1]]} == {found.partitions[n] for n in found.hours[hours[-1]]}
