"""The store of outcomes while several processes write, one is killed, and one gathers."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mlnb.project.errors import ServingError
from mlnb.serving import labels
from mlnb.serving.labels import Label, LabelLog, LabelStore, as_table, compact_labels, current_labels, drop_repetitions

START = datetime(2013, 7, 1, tzinfo=UTC)
WRITER = """
import sys
from datetime import UTC, datetime
from mlnb.serving.labels import Label, LabelLog
log, moment = LabelLog(sys.argv[1]), datetime(2013, 7, 1, tzinfo=UTC)
for i in range(int(sys.argv[3])):
    log.append([Label(f"{sys.argv[2]}-{i}", i % 2, moment, moment, "test")])
    print(i, flush=True)
"""
GATHERER = """
import sys
from mlnb.serving.labels import LabelStore, compact_labels
store = LabelStore(sys.argv[1], sys.argv[2])
print("begin", flush=True)
while True:
    compact_labels(store)
"""


def start(code, *words):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)


def label(entity, value, observed, received=None):
    return Label(
        entity, value, START + timedelta(hours=observed), START + timedelta(hours=received or observed), "test"
    )


def slowly(rows) -> dict:
    "What holds, by the rule as it is written"
    first: dict = {}
    for r in sorted(rows, key=lambda r: r.received_at):
        first.setdefault((r.entity, r.value, r.observed_at), r)
    held: dict = {}
    for r in sorted(first.values(), key=lambda r: (r.observed_at, r.received_at, r.value)):
        held[r.entity] = r.value
    return held


@pytest.mark.parametrize("seed", range(20))
def test_what_holds_does_not_depend_on_order_repetition_or_place(tmp_path, seed):
    rng = random.Random(seed)
    rows = [
        label(f"e{rng.randrange(30)}", rng.randrange(2), rng.randrange(5), rng.randrange(5, 20)) for _ in range(200)
    ]
    store, log = LabelStore(tmp_path / "lines", str(tmp_path / "parts")), LabelLog(tmp_path / "lines")
    sent = rows + rng.choices(rows, k=100)
    rng.shuffle(sent)
    for i in range(0, 300, 30):
        log.append(sent[i : i + 30]) if i % 60 else store.write(as_table(sent[i : i + 30]))
    result = current_labels(store.read())
    assert dict(zip(result["entity"].to_pylist(), result["value"].to_pylist(), strict=True)) == slowly(rows)
    log.close()
    compact_labels(store)
    again = current_labels(store.read())
    assert again.sort_by("entity").equals(result.sort_by("entity"))
    assert drop_repetitions(store.read()).num_rows == len({(r.entity, r.value, r.observed_at) for r in rows})


def test_a_correction_that_comes_late_holds_and_the_history_tells(tmp_path):
    store = LabelStore(tmp_path / "lines", str(tmp_path / "parts"))
    store.write(as_table([label("a", 0, 5)]))
    store.write(as_table([label("a", 1, 9), label("a", 0, 7, 20)]))
    assert current_labels(store.read()).to_pylist()[0]["value"] == 1
    assert current_labels(store.read(), np.datetime64("2013-07-01T06:00")).to_pylist()[0]["value"] == 0
    assert store.history("a")["value"].to_pylist() == [0, 0, 1]


def test_processes_write_and_are_killed_while_another_gathers_and_is_killed(tmp_path):
    store = LabelStore(tmp_path / "lines", str(tmp_path / "parts"))
    acknowledged, seen = set(), 0
    for turn in range(3):
        writers = {f"{turn}{i}": start(WRITER, tmp_path / "lines", f"{turn}{i}", 100_000) for i in range(2)}
        gatherer = start(GATHERER, tmp_path / "lines", tmp_path / "parts")
        gatherer.stdout.readline()
        for name, process in writers.items():
            for _ in range(300):
                acknowledged.add(f"{name}-{process.stdout.readline().strip()}")
            result = set(current_labels(store.read())["entity"].to_pylist())
            assert acknowledged <= result and len(result) >= seen
            seen = len(result)
        for process in [*writers.values(), gatherer]:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    compact_labels(store)
    assert not list(store.folder.glob("*.jsonl"))
    assert acknowledged <= set(current_labels(store.read())["entity"].to_pylist())
    assert drop_repetitions(store.read()).num_rows == current_labels(store.read()).num_rows


def test_what_was_gathered_and_not_removed_yet_is_there_once(tmp_path):
    store, log = LabelStore(tmp_path / "lines", str(tmp_path / "parts")), LabelLog(tmp_path / "lines")
    log.append([label("a", 1, 5)])
    (file,) = store.folder.glob("*.jsonl")
    log.close()
    kept = file.read_bytes()
    compact_labels(store)
    file.write_bytes(kept + b'{"entity": "torn')  # as a kill leaves it
    assert drop_repetitions(store.read()).num_rows == 1
    compact_labels(store)
    assert len(store.parts()) == 1 and store.read().num_rows == 1


def test_lines_that_cannot_be_read_are_set_aside_and_the_others_kept(tmp_path, caplog):
    store, log = LabelStore(tmp_path / "lines", str(tmp_path / "parts")), LabelLog(tmp_path / "lines")
    log.append([label(f"e{i}", 1, 5) for i in range(4)])
    log.close()
    (file,) = store.folder.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    other, torn = lines[2].replace(b'"source"', b'"origin"'), lines[0][:30]
    odd = [b"{\xff}\n", b"[" * 100_000 + b"\n", b"7\n"]
    file.write_bytes(b"".join([lines[0], b"\0" * 4096, lines[1], b"\n", other, *odd, lines[3], b"\0" * 4096, torn]))
    assert set(store.read()["entity"].to_pylist()) == {"e0", "e1", "e3"}
    assert compact_labels(store) == 3 and set(store.read()["entity"].to_pylist()) == {"e0", "e1", "e3"}
    aside = store.folder / "damaged" / file.name
    assert aside.read_bytes() == b"".join([other, *odd, b"\0" * 4096, torn]) and not file.exists()
    assert f"5 lines of {file.name}" in caplog.text and str(aside) in caplog.text
    compact_labels(store)
    assert aside.exists() and len(store.parts()) == 1


READER = """
import os, sys
from mlnb.project.errors import ServingError
from mlnb.serving.labels import LabelStore
store = LabelStore(sys.argv[1], sys.argv[2])
store.read()  # imports what another user may not
os.setuid(65534)
try:
    print(store.read().num_rows)
except ServingError as e:
    print(e)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("closed", ["lines", "parts", "parts/deep", "parts/a.parquet"])
def test_what_may_not_be_read_is_not_taken_for_nothing(closed):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        store, log = LabelStore(f"{folder}/lines", f"{folder}/parts"), LabelLog(f"{folder}/lines")
        log.append([label("a", 1, 5)])
        for name in ("a", "deep/b"):
            (Path(folder) / "parts" / name).parent.mkdir(exist_ok=True)
            store.write(as_table([label("b", 1, 5)]), name)
        read = lambda: start(READER, store.folder, store.url).communicate()[0].strip()
        assert read() == "3"
        (Path(folder) / closed).chmod(0)
        assert "cannot be read" in read() and "Permission denied" in read()


def test_two_do_not_gather_at_once(tmp_path):
    store, log = LabelStore(tmp_path / "lines", str(tmp_path / "parts")), LabelLog(tmp_path / "lines")
    log.append([label("a", 1, 5)])
    log.close()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.folder / "gather")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    assert compact_labels(store) == 0
    process.communicate()
    assert compact_labels(store) == 1


@pytest.mark.parametrize("tiny", [0, 20])
def test_parts_that_are_nearly_large_do_not_keep_the_others_from_being_merged(tmp_path, tiny):
    store = LabelStore(tmp_path / "lines", str(tmp_path / "parts"))
    keys = np.random.default_rng(0).bytes(32 * 200_000).hex()
    table = as_table(label(keys[64 * i : 64 * i + 64], 1, 5) for i in range(200_000))
    store.write(table.slice(0, 20_000), "measure")
    (size,) = store.parts().values()
    for i in range(20):
        store.write(table.slice(0, int(20_000 * labels._SMALL_PART_BYTES / size * 0.95)), f"a{i:02}")
    for i in range(tiny):
        store.write(as_table([label(f"b{i}", 1, 5)]), f"b{i:02}")
    before = current_labels(store.read()).num_rows
    for _ in range(3):
        compact_labels(store)
    assert sum(size < labels._SMALL_PART_BYTES for size in store.parts().values()) < labels._MERGE_MIN_PARTS
    assert current_labels(store.read()).num_rows == before


def test_a_bucket_is_as_good_as_a_folder(tmp_path):
    store = LabelStore(tmp_path / "lines", f"memory://outcomes-{os.getpid()}")
    for i in range(20):
        store.write(as_table([label(f"e{i}", 1, 5)]))
    compact_labels(store)
    assert len(store.parts()) == 1 and current_labels(store.read()).num_rows == 20
    fsspec.filesystem("memory").rm(f"/outcomes-{os.getpid()}", recursive=True)


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    log = LabelLog(tmp_path)
    log.append([label("a", 1, 5)])

    def full(number, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ServingError, match="No space left on device; none of these 1 is kept"):
        log.append([label("b", 1, 5)])


def test_lines_are_json_that_others_can_read(tmp_path):
    LabelLog(tmp_path).append([label("a", 1, 5)])
    (file,) = tmp_path.glob("*.jsonl")
    assert json.loads(file.read_text()) == {
        "entity": "a", "value": 1, "source": "test",
        "observed_at": "2013-07-01T05:00:00Z", "received_at": "2013-07-01T05:00:00Z",
    }  # fmt: skip
