import os
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
from waiting import TIMEOUT_SECONDS, until

from mlnb.data.point_in_time import (
    Events,
    FeatureSnapshot,
    FeatureView,
    LatestReadings,
    PointInTimeFeatures,
    distinct_rows,
    floor_to_interval,
    to_columns,
)
from mlnb.data.snapshot_store import SnapshotStore
from mlnb.project.errors import ContractError
from mlnb.project.settings import load_settings

START = np.datetime64("2013-03-01", "s")


def at(minutes):
    return START + np.asarray(minutes) * 60


def some_events(seed, n=400):
    rng = np.random.default_rng(seed)
    keys = {"place": rng.choice(["a", "b", "c", "dd"], n), "number": rng.integers(0, 5, n).astype(float)}
    times = at(rng.integers(0, 3000, n)).astype("datetime64[s]")
    times[rng.random(n) < 0.1] = np.datetime64("NaT")
    values = rng.integers(-30, 300, n).astype(float)
    values[rng.random(n) < 0.1] = np.nan
    return keys, times, values


def some_pairs(seed, n=200):
    rng = np.random.default_rng(seed)
    keys = {"place": rng.choice(["a", "b", "c", "dd", "unknown"], n), "number": rng.integers(0, 7, n).astype(float)}
    return {"moment": floor_to_interval(at(rng.integers(0, 3000, n))), **keys}


def by_hand(keys, times, values, pair, since, until):
    "The definition of a window, one row after another"
    count = total = 0
    for i, time in enumerate(times):
        if np.isnat(time) or np.isnan(values[i]) or any(keys[name][i] != pair[name] for name in keys):
            continue
        after = int((time - pair["moment"]).astype(int))
        if (since is None or after >= since) and after <= until:
            count, total = count + 1, total + int(values[i])
    return count, total


@pytest.mark.parametrize("since, until", [(-3600, 0), (-86400, 0), (None, 0), (900, 9000), (0, 0)])
def test_windows_are_what_their_definition_says(since, until):
    keys, times, values = some_events(1)
    pairs = some_pairs(2)
    count, total = Events(keys, times, values).window(pairs, since, until)
    for i in range(len(count)):
        pair = {name: column[i] for name, column in pairs.items()}
        assert (count[i], total[i]) == by_hand(keys, times, values, pair, since, until)


def test_windows_include_both_ends():
    events = Events({"k": np.array(["x", "x"])}, at([0, 60]).astype("datetime64[s]"))
    pairs = {"moment": at([60, 60]), "k": np.array(["x", "x"])}
    assert events.window(pairs, -3600)[0].tolist() == [2, 2] and events.window(pairs, -3599)[0].tolist() == [1, 1]


def test_events_refuse_fractions_since_their_sums_would_depend_on_the_order():
    with pytest.raises(ContractError, match="Events takes integers"):
        Events({"k": np.array(["x"])}, at([0]), np.array([0.5]))


def test_events_and_readings_without_a_row():
    nothing = {"k": np.array([], "U1")}
    pairs = {"moment": at([0]), "k": np.array(["x"])}
    none = np.array([], "datetime64[s]")
    assert [part.tolist() for part in Events(nothing, none).window(pairs, None)] == [[0], [0]]
    assert np.isnan(LatestReadings(nothing, none, {"v": np.array([])}).at(pairs, 60)["v"]).all()


def crowded(columns, values=40_000):
    "More combinations than have room beside a time, of which 40,003 occur; the last three are one key"
    keys = {f"k{i}": np.array([f"v{(i * 7919 + j) % values:05}" for j in range(values)]) for i in range(columns)}
    return {name: np.append(column, [column[5]] * 3) for name, column in keys.items()}


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_no_key_is_taken_for_another_however_many_could_be(columns):
    keys = crowded(columns)
    times = np.full(40_003, at(0))
    pairs = {"moment": np.full(2000, at(15)), **{name: column[:2000] for name, column in keys.items()}}
    pairs["k0"] = np.append(keys["k0"][:1000], keys["k0"][1000:2000][::-1])
    expected = [4 if i == 5 else int(i < 1000) for i in range(2000)]
    assert Events(keys, times).window(pairs, -3600)[0].tolist() == expected
    values = LatestReadings(keys, times, {"v": np.arange(40_003.0)}).at(pairs, 3600)["v"]
    assert np.array_equal(
        values, [40_002 if i == 5 else i if i < 1000 else np.nan for i in range(2000)], equal_nan=True
    )


def test_a_key_that_would_share_its_number_at_the_limit_does_not():
    users, items = np.array([f"u{i:05}" for i in range(70_000)]), np.array([f"i{i:05}" for i in range(70_000)])
    keys = {
        "user": np.append(users, users[30_678:30_679]),
        "item": np.append(items, items[35_993:35_994]),
    }  # 2^31 combinations on
    pairs = {"moment": at([15]), "user": users[:1], "item": items[12_345:12_346]}
    assert Events(keys, np.full(70_001, at(0))).window(pairs, None)[0].tolist() == [0]


def test_more_keys_than_have_room_are_refused(monkeypatch):
    monkeypatch.setattr("mlnb.data.point_in_time._MAX_KEYS", 3)
    Events({"k": np.array(["a", "b", "c"]), "l": np.array(["a", "b", "c"])}, at([0, 1, 2]))
    with pytest.raises(ContractError, match="k, l have 4 distinct keys, the maximum is 3"):
        Events({"k": np.array(["a", "b", "c", "a"]), "l": np.array(["a", "b", "c", "b"])}, at([0, 1, 2, 3]))


@pytest.mark.parametrize("most", [1 << 30, 20])
def test_a_number_that_is_missing_is_no_key(monkeypatch, most):
    monkeypatch.setattr("mlnb.data.point_in_time._MAX_KEYS", most)
    keys = {"place": np.array(["a", "b", "a"]), "number": np.array([np.nan, 1.0, 2.0])}
    keys = {
        "place": np.tile(keys["place"], 3),
        "number": np.tile(keys["number"], 3),
        "of": np.repeat(["x", "y", "z"], 3),
    }
    asked = {
        "moment": at([15, 15]),
        "place": np.array(["a", "b"]),
        "number": np.array([np.nan, 1.0]),
        "of": np.array(["x", "x"]),
    }
    assert Events(keys, np.full(9, at(0))).window(asked, None)[0].tolist() == [0, 1]


def test_a_reading_whose_time_is_missing_was_never_known():
    times = np.array([np.datetime64("NaT"), at(0), np.datetime64("NaT")], "datetime64[s]")
    latest = LatestReadings({"k": np.array(["a", "b", "b"])}, times, {"v": np.array([99.0, 1.0, 99.0])})
    values = latest.at({"k": np.array(["a", "b"]), "moment": at([15, 15])}, max_age_seconds=3600)["v"]
    assert np.array_equal(values, [np.nan, 1.0], equal_nan=True)


def test_latest_reading_is_the_newest_known_and_not_too_old():
    times = at([0, 60, 120]).astype("datetime64[s]")
    latest = LatestReadings({"k": np.array(["x", "x", "y"])}, times, {"v": np.array([1.0, np.nan, 3.0])})
    ask = {"moment": at([0, 59, 60, 300, 120, 119, 0]), "k": np.array(["x", "x", "x", "x", "y", "y", "z"])}
    values = latest.at(ask, max_age_seconds=3600)["v"]
    assert np.array_equal(values, [1, 1, np.nan, np.nan, 3, np.nan, np.nan], equal_nan=True)


def evaluate(events, pairs):
    count, total = events.window(pairs, -86400)
    return {"mean": np.where(count > 0, total / np.maximum(count, 1), np.nan), "rate": (count + 5.0) / (count + 20.0)}


def known(events):
    values = events.keys.values
    places, numbers = np.meshgrid(values["place"], values["number"])
    return {"place": places.ravel(), "number": numbers.ravel()}


def a_context():
    return PointInTimeFeatures([FeatureView("view", ("place", "number"), ("mean", "rate"), evaluate, known)])


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def test_batch_equals_snapshots_bit_for_bit_for_known_and_unknown_keys():
    context, events, rows = a_context(), Events(*some_events(3)), some_pairs(4)
    batch = context(events, rows)
    assert list(batch) == ["mean", "rate"] and np.isnan(batch["mean"]).any()
    for as_of in np.unique(rows["moment"]):
        snapshot = context.snapshot(events, as_of)
        mine = rows["moment"] == as_of
        asked = {name: column[mine] for name, column in rows.items()}
        same({name: column[mine] for name, column in batch.items()}, snapshot.lookup(asked))
        same(snapshot.lookup(asked), FeatureSnapshot.from_bytes(snapshot.to_bytes()).lookup(asked))


def test_rows_do_not_influence_each_other():
    context, events, rows = a_context(), Events(*some_events(3)), some_pairs(4)
    batch = context(events, rows)
    for i in range(0, len(rows["moment"]), 17):
        alone = context(events, {name: column[i : i + 1] for name, column in rows.items()})
        same(alone, {name: column[i : i + 1] for name, column in batch.items()})


def test_later_history_does_not_influence_a_moment():
    keys, times, values = some_events(5)
    rows = some_pairs(6)
    as_of = np.sort(rows["moment"])[100]
    past = ~(times > as_of)
    cut = Events({name: column[past] for name, column in keys.items()}, times[past], values[past])
    early = {name: column[rows["moment"] <= as_of] for name, column in rows.items()}
    same(a_context()(cut, early), a_context()(Events(keys, times, values), early))


def test_snapshots_of_many_moments_equal_those_of_one_whatever_the_chunk():
    context, events = a_context(), Events(*some_events(7))
    as_of_times = floor_to_interval(at(np.arange(0, 3000, 45)))
    alone = [context.snapshot(events, as_of).to_bytes() for as_of in as_of_times]
    assert [s.to_bytes() for s in context.snapshots(events, as_of_times, chunk=7)] == alone
    assert [s.to_bytes() for s in context.snapshots(events, as_of_times)] == alone


def test_a_snapshot_keeps_no_key_that_has_the_default():
    snapshot = a_context().snapshot(Events(*some_events(3)), np.datetime64("2020-01-01"))
    assert snapshot.rows == 0 and snapshot.lookup({"place": np.array(["a"]), "number": np.array([1.0])})[
        "rate"
    ].tolist() == [0.25]


def test_a_moment_between_two_quarters_is_refused():
    rows = {"moment": at([7]), "place": np.array(["a"]), "number": np.array([1.0])}
    with pytest.raises(ContractError, match="2013-03-01T00:07:00 is not a multiple of 15 minutes"):
        a_context()(Events(*some_events(3)), rows)


def test_a_feature_belongs_to_one_view():
    view = FeatureView("view", ("place",), ("mean",), evaluate, known)
    with pytest.raises(ContractError, match="'mean' is in two views"):
        PointInTimeFeatures([view, view])


def test_distinct_rows_can_be_put_together_again():
    rows = some_pairs(8)
    first, kind = distinct_rows(rows)
    assert len(first) == len(set(zip(*(column.tolist() for column in rows.values()), strict=True)))
    assert all(np.array_equal(column[first][kind], column) for column in rows.values())


def test_columns_of_a_frame():
    zoned = pd.to_datetime(["2013-07-04T12:00-04:00", None], utc=True).tz_convert("America/New_York")
    columns = to_columns(pd.DataFrame({"text": ["x", "yy"], "whole": [1, 2], "truth": [True, False], "time": zoned}))
    assert columns["text"].dtype.kind == "U" and columns["whole"].dtype == columns["truth"].dtype == np.float64
    assert columns["time"][0] == np.datetime64("2013-07-04T16:00", "s") and np.isnat(columns["time"][1])
    with pytest.raises(ContractError, match="'text' has 1 missing"):
        to_columns(pd.DataFrame({"text": ["x", None]}))


# the store


def a_snapshot(as_of):
    return a_context().snapshot(Events(*some_events(9)), as_of)


def moments_of(store):
    return store.as_of_times().astype("datetime64[m]").astype(str).tolist()


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    yield SnapshotStore(
        tmp_path / "deep" / "context" if request.param == "folder" else f"memory://{tmp_path.name}/context",
        listing_ttl=0,
    )
    if request.param == "memory":
        import fsspec

        fsspec.filesystem("memory").store.clear()


def test_an_empty_store(store):
    assert store.newest(START) is None and store.as_of_times().tolist() == []


def test_newest_is_not_later_than_asked(store):
    for minutes in (0, 15, 45):
        store.write(a_snapshot(at(minutes)))
    assert moments_of(store) == ["2013-03-01T00:00", "2013-03-01T00:15", "2013-03-01T00:45"]
    for asked, expected in [(0, 0), (14, 0), (15, 15), (44, 15), (45, 45), (9999, 45)]:
        assert store.newest(at(asked)).as_of == at(expected)
    assert store.newest(at(-1)) is None


def test_what_is_read_is_what_was_written(store):
    snapshot, rows = a_snapshot(at(1500)), some_pairs(10)
    size = store.write(snapshot)
    assert size == len(snapshot.to_bytes())
    same(SnapshotStore(store.url).newest(at(1500)).lookup(rows), snapshot.lookup(rows))


@pytest.mark.parametrize(("storage", "url"), [("kept/", "{}/kept/context"), ("s3://bucket/flights/", "s3://bucket/flights/context")])
def test_the_context_of_a_project_lies_in_its_storage(tmp_path, storage, url):
    (tmp_path / "pyproject.toml").write_text(f'[tool.mlnb]\npackage = "toy"\nstorage = "{storage}"\n')
    assert SnapshotStore.of(load_settings(tmp_path)).url == url.format(tmp_path)


def test_another_writer_is_noticed_after_the_refresh(tmp_path):
    reader, writer = SnapshotStore(tmp_path, listing_ttl=0), SnapshotStore(tmp_path)
    assert reader.newest(at(60)) is None
    writer.write(a_snapshot(at(0)))
    assert reader.newest(at(60)).as_of == at(0)
    writer.write(a_snapshot(at(15)))
    assert reader.newest(at(60)).as_of == at(15)
    believing = SnapshotStore(tmp_path, listing_ttl=3600)
    assert believing.newest(at(60)).as_of == at(15)
    writer.write(a_snapshot(at(30)))
    assert believing.newest(at(60)).as_of == at(15)


def test_what_was_read_is_served_while_the_storage_is_away(tmp_path, caplog):
    folder = tmp_path / "context"
    store = SnapshotStore(folder, listing_ttl=1000)
    store.write(a_snapshot(at(0)))
    assert store.newest(at(60)).as_of == at(0)
    folder.rename(tmp_path / "aside")
    folder.write_text("what cannot be listed")
    for _ in range(2):  # once a refresh
        store._listed_at -= 2500
        assert [store.newest(at(60)).as_of for _ in range(5)] == [at(0)] * 5
    assert caplog.text.count("cannot be listed, the 1 snapshots seen before are used") == 2
    with pytest.raises(NotADirectoryError):
        SnapshotStore(folder).newest(at(60))
    folder.unlink()
    (tmp_path / "aside").rename(folder)
    SnapshotStore(folder).write(a_snapshot(at(15)))
    store._listed_at -= 2500
    assert store.newest(at(60)).as_of == at(15)


def test_a_listing_is_made_anew_beside_the_requests(tmp_path, monkeypatch):
    store, may_go = SnapshotStore(tmp_path, listing_ttl=1000), threading.Event()
    store.write(a_snapshot(at(0)))
    assert store.newest(at(60)).as_of == at(0)
    SnapshotStore(tmp_path).write(a_snapshot(at(15)))
    listdir, calls = os.listdir, []

    def slow(folder):
        calls.append(folder)
        assert may_go.wait(TIMEOUT_SECONDS)
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", slow)
    store._listed_at -= 1500
    assert [store.newest(at(60)).as_of for _ in range(5)] == [at(0)] * 5
    store._listed_at -= 5000  # however long it takes
    assert store.newest(at(60)).as_of == at(0) and len(calls) == 1
    may_go.set()
    until(lambda: store.newest(at(60)).as_of == at(15), "the new listing")


def test_a_name_that_is_no_moment_is_passed_over(tmp_path, caplog):
    store = SnapshotStore(tmp_path)
    store.write(a_snapshot(at(0)))
    (tmp_path / "20130399T999999Z.arrow").write_bytes(a_snapshot(at(0)).to_bytes())
    assert (
        store.newest(np.datetime64("2013-04-01")).as_of == at(0)
        and "20130399T999999Z.arrow is passed over" in caplog.text
    )


def test_a_damaged_snapshot_is_passed_over_with_a_warning_until_it_is_mended(tmp_path, caplog):
    store = SnapshotStore(tmp_path, listing_ttl=0)
    store.write(a_snapshot(at(0)))
    store.write(a_snapshot(at(15)))
    good = (tmp_path / "20130301T001500Z.arrow").read_bytes()
    for bad in (b"", good[:-1], good[: len(good) // 2], good[:100] + bytes([good[100] ^ 1]) + good[101:], b"x" * 1000):
        (tmp_path / "20130301T001500Z.arrow").write_bytes(bad)
        fresh = SnapshotStore(tmp_path, listing_ttl=0)
        assert fresh.newest(at(20)).as_of == at(0)
        assert "20130301T001500Z.arrow is passed over" in caplog.text and "checksum" in caplog.text
        caplog.clear()
    (tmp_path / "20130301T001500Z.arrow").write_bytes(good)
    assert fresh.newest(at(20)).as_of == at(15)


def test_a_snapshot_under_the_name_of_another_moment_is_passed_over(tmp_path, caplog):
    (tmp_path / "20130301T001500Z.arrow").write_bytes(a_snapshot(at(0)).to_bytes())
    assert SnapshotStore(tmp_path).newest(at(20)) is None and "context of 2013-03-01T00:00:00" in caplog.text


def test_corrupt_bytes_are_refused():
    good = a_snapshot(at(0)).to_bytes()
    for bad in (b"", good[1:], good + b"0"):
        with pytest.raises(ContractError, match="corrupt"):
            FeatureSnapshot.from_bytes(bad)


def test_other_files_in_the_folder_are_let_be(tmp_path):
    (tmp_path / "20130301T001500Z.arrow.0123.part").write_bytes(b"half")
    (tmp_path / "README").write_text("mine")
    assert SnapshotStore(tmp_path).newest(at(60)) is None


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_context import SnapshotStore, a_snapshot, at
store, snapshot = SnapshotStore({folder!r}), a_snapshot(at(0))
print("ready", flush=True)
for _ in range(150):
    store.write(snapshot)
"""


def test_readers_see_whole_snapshots_while_two_processes_write_the_same_moment(tmp_path, caplog, request):
    code = WRITER.format(tests=str(request.path.parent), folder=str(tmp_path))
    writers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    expected, reads = a_snapshot(at(0)).to_bytes(), 0
    while any(writer.poll() is None for writer in writers):
        snapshot = SnapshotStore(tmp_path).newest(at(5))  # nothing remembered
        if snapshot is not None:
            reads += snapshot.to_bytes() == expected
    assert [writer.wait() for writer in writers] == [0, 0] and reads > 0 and "passed over" not in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["20130301T000000Z.arrow"]
    for writer in writers:
        writer.stdout.close()


def test_threads_share_a_store(tmp_path):
    store = SnapshotStore(tmp_path, listing_ttl=0, keep=2)
    as_of_times = [at(15 * i) for i in range(6)]
    for as_of in as_of_times:
        store.write(a_snapshot(as_of))
    wrong = []

    def ask(seed):
        for i in np.random.default_rng(seed).integers(0, 6, 100):
            if store.newest(as_of_times[i]).as_of != as_of_times[i]:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(store._cache) <= 2
