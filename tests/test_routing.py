import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import toy_project
from waiting import is_alive, until

from mlnb.data.fields import DECISION_TIME, columns_of, entity_keys
from mlnb.models.hooks import Model
from mlnb.models.watcher import ModelVersion, Releases
from mlnb.models.write_bundle import write_bundle
from mlnb.project.errors import SettingError
from mlnb.project.settings import load_settings
from mlnb.serving import shadow
from mlnb.serving.app import RequestDecoder
from mlnb.serving.column_validation import ARROW, to_arrow_stream
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.log_records import concat_tables, read_tables
from mlnb.serving.messages import HttpError, RequestRows
from mlnb.serving.routing import FAILURE_THRESHOLD, Router, Routing, TrafficSplit, load_router, load_servable


class Odd(Model):
    "A challenger that answers its samples, and does with some carriers what a model should not"

    @classmethod
    def load(cls, folder):
        return cls()

    def features(self, request, context):
        return {"carrier": request["carrier"], "distance": request["distance"]}

    def predict(self, features):
        carriers = set(features["carrier"].tolist())
        if "RAISE" in carriers:
            raise ZeroDivisionError("a model's mistake")
        if "DIE" in carriers:
            os.kill(os.getpid(), signal.SIGKILL)
        if "HANG" in carriers:
            time.sleep(600)
        return features["distance"] / 3000


@pytest.fixture(scope="module")
def bundles(toy, tmp_path_factory):
    "Folders of three versions that take the same requests"
    from toy.bundle import REQUEST, build, samples

    place = tmp_path_factory.mktemp("versions")
    build(place / "v1", "v1")
    build(place / "v2", "v2", weights=(-0.5, 0.01, 0.2, 0.1))
    about = {
        "request": REQUEST,
        "entity": ["carrier", "flight", "origin", "departure"],
        "samples": samples(),
        "training": {},
    }
    for version in ("odd", "even"):
        write_bundle(place / version, name="toy", version=version, predictor=Odd(), **about)
    return place


@pytest.fixture
def router(toy, bundles, tmp_path):
    "Makes routers whose log is in `tmp_path`, and ends them"
    made = []

    def make(challenger="v2", champion="v1", **settings):
        settings = replace(load_settings(toy), predictions=str(tmp_path / "log"), **settings)
        made.append(
            Router(settings, load_servable(bundles / champion), challenger and load_servable(bundles / challenger))
        )
        return made[-1]

    yield make
    for one in made:
        one.stop()


def rows_of(bundle, n, **other):
    "n different requests"
    samples = bundle.samples["requests"]
    raw = [samples[i % len(samples)] | {"flight": i} | {k: v[i] for k, v in other.items()} for i in range(n)]
    return RequestRows(
        raw, columns_of(bundle.request, raw), columns_of([DECISION_TIME], raw)["decision_time"], datetime.now(UTC)
    )


@pytest.mark.parametrize("percent", [1, 10, 50, 99])
def test_the_share_is_as_set(percent):
    keys = [f"{carrier}/{i}/EWR" for carrier in ("UA", "B6", "DL", "AA") for i in range(10_000)]
    split = TrafficSplit("v2", percent)
    share = sum(split(keys)) / len(keys) * 100
    assert abs(share - percent) < 4 * (percent * (100 - percent) / len(keys)) ** 0.5


@pytest.mark.parametrize("percent", [0, 100])
def test_none_and_all(percent):
    assert set(TrafficSplit("v2", percent)(list(map(str, range(2000))))) == {percent == 100}


def test_an_experiment_keeps_its_entities_and_another_draws_its_own():
    keys = [str(i) for i in range(20_000)]
    tenth, half, other = (
        set(compress(keys, TrafficSplit(salt, percent)(keys))) for salt, percent in [("v2", 10), ("v2", 50), ("v3", 50)]
    )
    assert tenth < half
    assert abs(len(half & other) - 5000) < 300 and abs(len(tenth & other) - 1000) < 150


def test_keys_that_are_almost_the_same_are_drawn_apart():
    split, keys = TrafficSplit("v2", 50), [f"c{i:06}" for i in range(40_000)]
    assigned = np.array(split(keys))
    for step in (1, 2, 10, 1000):
        assert abs((assigned[step:] == assigned[:-step]).mean() - 0.5) < 0.02, step
    assert abs((assigned == split([f"d{key[1:]}" for key in keys])).mean() - 0.5) < 0.02


def test_every_process_draws_the_same():
    code = "from mlnb.serving.routing import TrafficSplit; "
    code += "print(TrafficSplit('v2', 50)([str(i) for i in range(100)]))"
    env = os.environ | {"PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert told.stdout.strip() == str(TrafficSplit("v2", 50)([str(i) for i in range(100)]))


def test_rows_of_one_request_are_answered_by_both_in_their_order(router, tmp_path):
    both = router(challenger_percent=50)
    rows = rows_of(both.bundle, 200)
    answers = both(rows)
    assert {(a.arm, a.model_version) for a in answers} == {("champion", "v1"), ("challenger", "v2")}
    for name, percent in (("champion", 0), ("challenger", 100)):
        alone = router(challenger_percent=percent)(rows)
        assert {a.arm for a in alone} == {name}
        here = [i for i, a in enumerate(answers) if a.arm == name]
        assert [alone[i].probability for i in here] == [answers[i].probability for i in here]
    assert [a.arm for a in both(rows)] == [a.arm for a in answers]
    logged = read_predictions(tmp_path / "log").set_index("request_id").loc[[a.request_id for a in answers]]
    assert logged["flight"].tolist() == list(range(200))
    for column in ("arm", "model_version", "probability"):
        assert logged[column].tolist() == [getattr(a, column) for a in answers]


def test_a_request_that_is_split_is_logged_in_one_piece_or_refused(router, monkeypatch):
    both, pieces = router(challenger_percent=50), []
    monkeypatch.setattr(both.log, "append", pieces.append)
    both(rows_of(both.bundle, 50))
    assert [len(p) for p in pieces] == [50]


@pytest.mark.parametrize("sent_before", [0, 1])
def test_a_table_that_is_split_is_logged_whole_or_refused(router, tmp_path, monkeypatch, sent_before):
    "Its two parts go to two files; the disk is full when the second one comes"
    both, write, written = router("odd", challenger_percent=50), os.write, []
    rows = rows_of(both.bundle, 100)
    table = replace(rows, raw=None, sent=pa.RecordBatch.from_pylist(rows.raw), fields=both.bundle.request)
    for _ in range(sent_before):
        both.table(table)

    def full(number, data):
        written.append(number)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        return write(number, data)

    with monkeypatch.context() as broken, pytest.raises(HttpError, match="could not be logged"):
        broken.setattr(os, "write", full)
        both.table(table)
    assert len(set(written)) == 2 and len(read_predictions(tmp_path / "log")) == 100 * sent_before
    both.table(table)
    logged = read_predictions(tmp_path / "log")
    assert len(logged) == 100 * (sent_before + 1) and logged.attrs["torn"] == 0
    assert sorted(logged["flight"].tolist()) == sorted([*range(100)] * (sent_before + 1))


def test_a_refusal_names_the_row_of_the_request(router):
    both = router(challenger_percent=50)
    rows = rows_of(both.bundle, 20)
    decision_times = rows.decision_times.copy()
    decision_times[17] = np.datetime64("2013-06-01T00:00:00")
    with pytest.raises(HttpError, match="for row 17,") as e:
        both(replace(rows, decision_times=decision_times))
    assert e.value.details["row"] == 17


@pytest.mark.parametrize("percent", [50, 100])
def test_rows_that_the_challenger_fails_on_are_the_champions(router, tmp_path, capfd, percent):
    both = router("odd", challenger_percent=percent)
    carriers = ["RAISE" if i in (3, 40, 41, 77) else "UA" for i in range(100)]
    rows = rows_of(both.bundle, 100, carrier=carriers)
    answers = both(rows)
    entities = entity_keys(both.bundle.entity, rows.request)
    assigned = TrafficSplit("odd", percent)(entities)
    assert any(assigned[i] for i in (3, 40, 41, 77))
    wanted = ["challenger" if d and c == "UA" else "champion" for d, c in zip(assigned, carriers, strict=True)]
    assert [a.arm for a in answers] == wanted
    assert all(a.model_version == {"champion": "v1", "challenger": "odd"}[a.arm] for a in answers)
    failed = sum(d and c == "RAISE" for d, c in zip(assigned, carriers, strict=True))
    assert both.counts["challenger_failed"] == failed and "ZeroDivisionError" in both.problem
    assert capfd.readouterr().err.count("Traceback") == 1  # not once a row
    logged = read_predictions(tmp_path / "log").set_index("request_id")
    assert len(logged) == 100 and logged.loc[[a.request_id for a in answers], "arm"].tolist() == wanted
    champion = router(None)(rows)
    for answer, alone in zip(answers, champion, strict=True):
        assert answer.arm == "challenger" or answer.probability == alone.probability


@pytest.mark.parametrize("percent", [50, 100])
def test_a_table_that_the_challenger_fails_on_in_part(router, tmp_path, percent):
    both = router("odd", challenger_percent=percent)
    carriers = ["RAISE" if i % 25 == 7 else "UA" for i in range(200)]
    rows = rows_of(both.bundle, 200, carrier=carriers)
    table = replace(rows, raw=None, sent=pa.RecordBatch.from_pylist(rows.raw), fields=both.bundle.request)
    found, who = both.table(table)
    answers = found.to_pylist()
    assert who == Counter((a["model_version"], a["arm"]) for a in answers)
    assigned = TrafficSplit("odd", percent)(entity_keys(both.bundle.entity, rows.request))
    wanted = ["challenger" if d and c == "UA" else "champion" for d, c in zip(assigned, carriers, strict=True)]
    assert [a["arm"] for a in answers] == wanted
    logged = read_predictions(tmp_path / "log").set_index("request_id").loc[[a["request_id"] for a in answers]]
    assert logged["flight"].tolist() == list(range(200)) and logged["arm"].tolist() == wanted


@pytest.mark.parametrize("champion", ["v1", "even"])
def test_a_table_is_logged_as_rows_are(router, tmp_path, champion):
    both = router("odd", champion, challenger_percent=50)
    raw = [row | {"flight": i, "distance": i / 7} for i, row in enumerate(rows_of(both.bundle, 100).raw)]
    columns = {f.name: [row[f.name] for row in raw] for f in (*both.bundle.request, DECISION_TIME)}
    for name in ("departure", "decision_time"):
        columns[name] = pa.array(list(map(datetime.fromisoformat, columns[name])), pa.timestamp("s", "UTC"))
    table, _ = RequestDecoder(both.bundle.request).decoder_for("/predict", {b"content-type": ARROW})(
        to_arrow_stream(pa.table(columns))
    )
    both.table(table)
    both(replace(rows_of(both.bundle, 100), raw=raw, request=table.request, decision_times=table.decision_times))
    both.log.close()
    files = {kind: list((tmp_path / "log").glob(kind)) for kind in ("*.arrows", "*.jsonl")}
    own = [
        "request_id",
        "logged_at",
        "latency_ms",
        "input.departure",
        "input.decision_time",
    ]  # which differ, or are written otherwise
    (as_table, as_rows) = (
        concat_tables([t for f in of_kind for t in read_tables(f, [])])[0]
        .to_pandas()
        .sort_values("input.flight")
        .drop(columns=own)
        for of_kind in files.values()
    )
    as_rows = as_rows[as_table.columns].reset_index(drop=True)
    assert as_table.reset_index(drop=True).equals(as_rows) and set(as_rows["arm"]) == {"champion", "challenger"}
    once = ["features.distance" not in pa.ipc.open_stream(f.read_bytes()).schema.names for f in files["*.arrows"]]
    assert sorted(once) == ([True] if champion == "even" else [False, True])  # v1 does not take the distance as it is


def test_a_challenger_that_fails_again_and_again_is_out_until_it_is_another(router, bundles, tmp_path, capfd):
    both = router("odd", challenger_percent=100)
    broken = ["RAISE"] * 300
    assert {a.arm for a in both(rows_of(both.bundle, 300, carrier=broken))} == {"champion"}
    assert both.counts["challenger_failed"] == FAILURE_THRESHOLD and "until its alias moves" in both.problem
    assert capfd.readouterr().err.count("Traceback") == 2  # the first and the last
    assert {a.arm for a in both(rows_of(both.bundle, 20))} == {"champion"}  # although it could
    both.apply_releases(Releases(ModelVersion(1, str(bundles / "v1")), ModelVersion(2, str(bundles / "v2"))))
    assert {a.model_version for a in both(rows_of(both.bundle, 20))} == {"v2"} and both.problem is None
    both.apply_releases(
        Releases(ModelVersion(1, str(bundles / "v1")), ModelVersion(3, str(bundles / "odd"))), Routing(100, False)
    )
    assert {a.model_version for a in both(rows_of(both.bundle, 20))} == {"odd"}
    assert len(read_predictions(tmp_path / "log")) == 360


def test_another_share_does_not_bring_a_challenger_back(router, bundles):
    both = router("odd", challenger_percent=100)
    both(rows_of(both.bundle, 50, carrier=["RAISE"] * 50))
    both.apply_releases(
        Releases(ModelVersion(1, str(bundles / "v1")), ModelVersion(3, str(bundles / "odd"))), Routing(60, True)
    )
    assert {a.arm for a in both(rows_of(both.bundle, 50))} == {"champion"} and both.arms.shadow
    assert both.counts["swaps"] == 0


def test_a_version_is_not_split_against_itself(router, bundles):
    both = router(challenger_percent=50, shadow=True)
    v1, v2, broken = (
        ModelVersion(1, str(bundles / "v1")),
        ModelVersion(2, str(bundles / "v2")),
        ModelVersion(3, str(bundles / "none")),
    )
    both.apply_releases(Releases(v2, broken))  # the challenger is promoted, the next one is not fit
    assert both.versions == {"champion": "v2"} and both.problem.startswith("challenger cannot become version 3")
    both.apply_releases(Releases(v1, v2))
    assert both.versions == {"champion": "v1", "challenger": "v2"} and both.problem is None
    both.apply_releases(Releases(broken, v1))  # the champion steps down, and has to stay
    assert both.versions == {"champion": "v1"} and both.problem.startswith("champion cannot become version 3")
    both.apply_releases(Releases(v1, v1))  # as somebody wants it
    assert both.versions == {"champion": "v1", "challenger": "v1"} and both.problem is None


def test_a_refusal_of_a_table_that_is_split_names_its_row(router):
    both = router(challenger_percent=50)
    rows = rows_of(both.bundle, 20)
    decision_times = rows.decision_times.copy()
    decision_times[17] = np.datetime64("2013-06-01T00:00:00")
    with pytest.raises(HttpError, match="for row 17,"):
        both.table(
            replace(
                rows,
                raw=None,
                sent=pa.RecordBatch.from_pylist(rows.raw),
                fields=both.bundle.request,
                decision_times=decision_times,
            )
        )


def test_one_version_alone(router):
    alone = router(None, challenger_percent=50, shadow=True)
    assert alone.versions == {"champion": "v1"} and {a.arm for a in alone(rows_of(alone.bundle, 20))} == {"champion"}
    assert alone.problem is None and set(alone.counts.values()) == {0}


def test_a_shadow_scores_what_the_champion_answered(router, bundles, tmp_path):
    both = router(challenger_percent=30, shadow=True)
    rows = rows_of(both.bundle, 300)
    answers = both(rows) + [both(rows.take([i]))[0] for i in range(40)]
    champions = [a.request_id for a in answers if a.arm == "champion"]
    until(lambda: both.counts["shadow_scored"] == len(champions))
    table = read_predictions(tmp_path / "log")
    seen = table[table["arm"] == "shadow"].set_index("request_id")
    assert sorted(seen.index) == sorted(champions) and set(seen["model_version"]) == {"v2"}
    alone = router(challenger_percent=100)(rows)
    assert seen.loc[[a.request_id for a in answers[:300] if a.arm == "champion"], "probability"].tolist() == [
        one.probability for one, a in zip(alone, answers, strict=False) if a.arm == "champion"
    ]
    assert str(seen["departure"].dtype).startswith("datetime64")  # as it was sent
    assert both.counts["shadow_failed"] == both.counts["shadow_dropped"] == 0 and both.problem is None


def test_a_row_that_the_shadow_cannot_score_leaves_the_others(router, tmp_path, capfd):
    both = router("odd", shadow=True)
    carriers = ["UA"] * 100
    carriers[30] = carriers[31] = "RAISE"
    both(rows_of(both.bundle, 100, carrier=carriers))
    until(lambda: sum(both.counts.values()) == 100)
    assert (both.counts["shadow_scored"], both.counts["shadow_failed"]) == (98, 2)
    assert "a model's mistake" in both.problem and capfd.readouterr().err.count("a model's mistake") == 1
    table = read_predictions(tmp_path / "log")
    assert (table["arm"] == "shadow").sum() == 98 and (table["arm"] == "champion").sum() == 100


def test_a_shadow_that_dies_is_replaced(router, monkeypatch):
    monkeypatch.setattr(shadow, "RESTART_DELAY_SECONDS", 0.01)
    both = router("odd", shadow=True)
    assert len(both(rows_of(both.bundle, 1, carrier=["DIE"]))) == 1
    until(lambda: both.counts["shadow_failed"] == 1)
    both(rows_of(both.bundle, 5))
    until(lambda: both.counts["shadow_scored"] == 5)


def test_a_shadow_that_falls_silent_stops_nobody_and_is_replaced(router, monkeypatch):
    monkeypatch.setattr(shadow, "RESTART_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(shadow, "MAX_QUEUED_ROWS", 50)
    both = router("odd", shadow=True)
    both(rows_of(both.bundle, 5))
    until(lambda: both.counts["shadow_scored"] == 5)  # it is up
    reply, hangs = shadow._receive_reply, threading.Event()

    def held(connection):
        "Wait for a reply only once the test has seen what happens meanwhile"
        hangs.wait()
        try:
            return reply(connection)
        finally:
            monkeypatch.setattr(shadow, "REPLY_TIMEOUT_SECONDS", 60.0)  # a busy machine starts the next one slowly

    monkeypatch.setattr(shadow, "_receive_reply", held)
    monkeypatch.setattr(shadow, "REPLY_TIMEOUT_SECONDS", 0.1)
    both(rows_of(both.bundle, 1, carrier=["HANG"]))
    until(lambda: both.arms.shadow._dequeued == 6)
    answered = sum(len(both(rows_of(both.bundle, 10))) for _ in range(20))  # while it hangs
    assert answered == 200 and both.counts["shadow_dropped"] == 150
    hangs.set()
    until(lambda: both.counts["shadow_failed"] == 1)
    until(lambda: both.counts["shadow_scored"] == 55)
    assert both.counts["shadow_failed"] == 1 and "stopped answering" in both.problem


def test_the_process_of_a_shadow_ends_with_its_router(router):
    both = router(shadow=True)
    both(rows_of(both.bundle, 5))
    until(lambda: both.counts["shadow_scored"] == 5)
    process = both.arms.shadow._process
    both.stop()
    assert process.poll() is not None


SERVICE = """
import sys, time
from dataclasses import replace
import test_routing
from mlnb.project.settings import load_settings
from mlnb.serving.routing import Router, load_servable

bundle = load_servable(sys.argv[1])
router = Router(replace(load_settings("."), predictions=sys.argv[2], shadow=True), bundle, bundle)
router(test_routing.rows_of(bundle, 5))
while not router.counts["shadow_scored"]:
    time.sleep(0.01)
print(router.arms.shadow._process.pid, flush=True)
time.sleep(600)
"""


def test_the_process_of_a_shadow_ends_with_a_service_that_is_killed(toy, bundles, tmp_path):
    env = toy_project.environment(toy)
    env["PYTHONPATH"] += f":{Path(__file__).parent}"
    command = [sys.executable, "-c", SERVICE, str(bundles / "v1"), str(tmp_path)]
    service = subprocess.Popen(command, cwd=toy, env=env, stdout=subprocess.PIPE, text=True)
    pid = int(service.stdout.readline())
    service.kill()
    service.wait()
    until(lambda: not is_alive(pid))


def test_a_wrong_share_is_a_wrong_setting(toy):
    for percent in (-1, 101):
        with pytest.raises(SettingError, match="from 0 to 100"):
            load_router(replace(load_settings(toy), challenger_percent=percent))
    with pytest.raises(SettingError, match='serve_from = "bundle"'):
        load_router(replace(load_settings(toy), serve_from="flights"))
