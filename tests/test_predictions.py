import os
import resource
import subprocess
import sys
from multiprocessing import get_context

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from msgspec.structs import replace

from mlnb.models.bundle import Bundle
from mlnb.project.errors import BundleError, ServingError
from mlnb.serving.log_reader import read_predictions, to_frame
from mlnb.serving.log_records import RECORD_FIELDS, read_tables, to_record_batch
from mlnb.serving.predictions import Prediction, PredictionLog
from mlnb.serving.round_trip import verify_round_trip


def prediction(number=0, version="v1", **features):
    at = f"2013-07-01T{number % 24:02}:00:00Z"
    raw = {"carrier": "UA", "distance": 1400, "departure": "2013-07-01T20:00:00-04:00"}
    seen = {"carrier": "UA", "wind": None if number % 2 else 3.5} | features
    answer = {"probability": 0.1 + 0.2, "decision": number % 2 == 0}
    return Prediction(f"r{number}", f"UA/{number}", at, at, version, "champion", at, 0.5, answer, raw, seen)


def test_what_is_logged_is_read(tmp_path):
    log = PredictionLog(tmp_path)
    log.append([prediction(1), prediction(0)])
    table = read_predictions(tmp_path)
    assert table["request_id"].tolist() == ["r0", "r1"] and table["probability"].tolist() == [0.1 + 0.2] * 2
    assert table["wind"].dtype == float and np.isnan(table["wind"][1])
    assert table["decision"].tolist() == [True, False] and table.attrs["torn"] == 0
    for name in ("time", "logged_at", "context_moment", "departure"):
        assert table[name].dtype == "datetime64[s]", name
    assert str(table["departure"][0]) == "2013-07-02 00:00:00"
    assert table.columns.tolist().count("carrier") == 1


def test_windows_and_versions(tmp_path):
    log = PredictionLog(tmp_path)
    log.append([prediction(i, "v1" if i < 3 else "v2") for i in range(6)])
    ids = lambda **where: read_predictions(tmp_path, **where)["request_id"].tolist()
    assert ids(since="2013-07-01T04:00:00Z") == ["r4", "r5"]
    assert ids(until="2013-07-01 02:00") == ["r0", "r1"]
    assert ids(since="2013-06-30T22:00:00-04:00", until="2013-07-01T03:00:00") == ["r2"]
    assert ids(version="v2") == ["r3", "r4", "r5"]


def test_versions_with_other_features_stand_in_one_table(tmp_path):
    log = PredictionLog(tmp_path)
    log.append([prediction(0), prediction(1, "v2", gust=9.0)])
    table = read_predictions(tmp_path)
    assert np.isnan(table["gust"][0]) and table["gust"][1] == 9.0


def test_columns_stand_in_one_order_whichever_file_comes_first(tmp_path):
    for row in (prediction(0, gust=9.0), prediction(1, "v2", rain=1.0)):
        log = PredictionLog(tmp_path)
        log.append([row])
        log.close()
    found = [table for file in tmp_path.iterdir() for table in read_tables(file, [])]
    one, other = to_frame(found), to_frame(found[::-1])
    assert one.equals(other) and one.columns.tolist()[-2:] == ["gust", "rain"]


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_feature_that_is_an_input_is_written_once_and_read_twice(tmp_path, cut, fixed_clock):
    own = dict.fromkeys(RECORD_FIELDS) | {
        "request_id": ["a", "b"],
        "time": np.zeros(2, "datetime64[s]"),
        "model_version": "v1",
        "score": 0.5,
    }
    log, wind = PredictionLog(tmp_path), np.array([1.5, np.nan])
    for feature in (wind, wind.copy(), wind, wind + 1):
        log.append_table(to_record_batch({"gust": wind, "wind": wind + 2}, {"wind": feature, "gust": wind + 3}, **own))
    log.close()
    written = lambda file: pa.ipc.open_stream(file.read_bytes()).schema.names
    once, apart = sorted(
        tmp_path.iterdir(), key=lambda file: len(written(file))
    )  # a file of each way, whatever the values are
    assert "features.wind" not in written(once) and "features.wind" in written(apart)
    if cut:
        os.truncate(once, once.stat().st_size - cut)
    damaged = []
    (first,), (second,) = (list(read_tables(file, damaged)) for file in (once, apart))
    assert first.schema.equals(second.schema, check_metadata=True) and len(damaged) == bool(cut)
    assert first["features.wind"].to_pylist() == first["input.gust"].to_pylist() == [1.5, None] * (1 if cut else 2)
    assert second["features.wind"].to_pylist() == [1.5, None, 2.5, None]


def test_a_line_says_once_what_was_sent_and_seen(tmp_path):
    log, raw = PredictionLog(tmp_path), {"carrier": "UA", "flight": 7, "distance": 2**60, "delay": 1}
    form = {"input": raw, "unseen": ["delay", "decision_time"], "integers": ["flight"]}
    log.append([replace(prediction(i), **form | {"features": {"delay": i + 0.5}}) for i in range(2)])
    log.append([replace(prediction(2), input=raw), replace(prediction(3), **form | {"features": {}, "unseen": None})])
    log.close()
    (file,) = tmp_path.iterdir()
    seen, whole, unseen = read_tables(file, [])
    of = lambda table, prefix: {
        n.removeprefix(prefix): table[n].to_pylist()[0] for n in table.column_names if n.startswith(prefix)
    }
    assert of(seen, "input.") == raw | {"distance": 2.0**60, "delay": 1.0}
    assert of(seen, "features.") == {"carrier": "UA", "flight": 7.0, "distance": 2.0**60, "delay": 0.5}
    assert (of(whole, "input."), of(whole, "features.")) == (raw, {"carrier": "UA", "wind": 3.5})
    assert of(unseen, "features.") == {} and isinstance(of(seen, "features.")["flight"], float)
    assert [len(table) for table in (seen, whole, unseen)] == [2, 1, 1]


def test_an_empty_log(tmp_path):
    assert len(read_predictions(tmp_path / "nowhere")) == 0 and "entity" in read_predictions(tmp_path).columns


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_torn_last_line_is_skipped_and_counted(tmp_path, cut):
    log = PredictionLog(tmp_path)
    log.append([prediction(0), prediction(1)])
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - cut)
    table = read_predictions(tmp_path)
    assert (len(table), table.attrs["torn"]) == (1, 1)


def test_a_damaged_line_in_the_middle_is_skipped_and_counted(tmp_path, fixed_clock):
    log = PredictionLog(tmp_path)
    for i in range(3):
        log.append([prediction(i)])
    (file,) = tmp_path.iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"\x00\xff garbage\n" + lines[2] + msgspec.json.encode(prediction(5))[:50])
    table = read_predictions(tmp_path)
    assert table["request_id"].tolist() == ["r0", "r2"] and table.attrs["torn"] == 2


def _fill(folder, who):
    log = PredictionLog(folder)
    for i in range(200):
        log.append([prediction(who * 1000 + i), prediction(who * 1000 + 500 + i)])


def test_several_processes(tmp_path):
    context = get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, who)) for who in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    table = read_predictions(tmp_path)
    assert len(table) == table["request_id"].nunique() == 1200 and table.attrs["torn"] == 0


def test_a_forked_process_writes_to_a_file_of_its_own(tmp_path, fixed_clock):
    log = PredictionLog(tmp_path)
    log.append([prediction(0)])
    child = get_context("fork").Process(target=log.append, args=([prediction(1)],))
    child.start()
    child.join()
    log.append([prediction(2)])
    assert len(list(tmp_path.iterdir())) == 2 and len(read_predictions(tmp_path)) == 3


def test_a_file_removed_under_the_log_swallows_nothing(tmp_path):
    log = PredictionLog(tmp_path / "log")
    log.append([prediction(0)])
    for file in (tmp_path / "log").iterdir():
        file.unlink()
    (tmp_path / "log").rmdir()
    log.append([prediction(1)])
    assert read_predictions(tmp_path / "log")["request_id"].tolist() == ["r1"]


def test_a_file_moved_under_the_log_goes_on(tmp_path):
    log = PredictionLog(tmp_path / "log")
    log.append([prediction(0)])
    (tmp_path / "log").rename(tmp_path / "moved")
    log.append([prediction(1)])
    assert (
        read_predictions(tmp_path / "moved")["request_id"].tolist() == ["r0", "r1"] and not (tmp_path / "log").exists()
    )


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServingError, match=r"the prediction log in .*file/log cannot be written: Not a directory"):
        PredictionLog(tmp_path / "file" / "log").append([prediction(0)])


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_predictions import prediction, PredictionLog, ServingError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = PredictionLog({folder!r})
log.append([prediction(0)])
resource.setrlimit(resource.RLIMIT_FSIZE, (900, resource.RLIM_INFINITY))
for i in range(1, 4):
    try:
        log.append([prediction(i)] * i)
        print("written", i)
    except ServingError as e:
        print(e)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append([prediction(9)])
"""


def test_a_disk_that_fills_up_tears_no_other_line(tmp_path):
    code = FULL_DISK.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "log"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be written: File too large" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    table = read_predictions(tmp_path / "log")
    assert table["request_id"].iloc[-1] == "r9" and "r0" in set(table["request_id"]) and table.attrs["torn"] == 0
    acknowledged = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("written")]
    assert len(table) == 2 + sum(acknowledged)


def test_a_bundle_whose_answers_do_not_come_back_from_the_log_is_not_served(toy, monkeypatch):
    bundle = Bundle.load(toy / "products/bundle")
    assert verify_round_trip(bundle) == 12
    monkeypatch.setattr(bundle, "version", "")  # a line without a version has no place in a table
    with pytest.raises(BundleError, match=r"is answered with .* and read back from the log as .*None"):
        verify_round_trip(bundle)
    monkeypatch.setattr(bundle, "version", "v1")
    monkeypatch.setattr(bundle.model, "decide", lambda probability: (probability > 0.5).astype(int))
    with pytest.raises(BundleError, match="decision has dtype int64; give a numpy array of True or False"):
        verify_round_trip(bundle)
