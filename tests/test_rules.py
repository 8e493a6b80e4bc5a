"""Rules look at real things: a service of its own process, a log, a context, runs."""

import datetime as dt
import socketserver
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import numpy as np
import pandas as pd
import pytest
import toy_project
from uvicorn_process import run_server
from waiting import until

from mlnb.data.profiles import Profile
from mlnb.data.snapshot_store import SnapshotStore
from mlnb.monitoring import alert_notebook
from mlnb.monitoring.alerts import AlertStore
from mlnb.monitoring.drift_sources import DriftSource, RowFilter, read_windows
from mlnb.monitoring.drift_thresholds import calibrate
from mlnb.monitoring.http_client import http_get
from mlnb.monitoring.rules import RULE_KINDS, evaluate, from_table, load_rules
from mlnb.monitoring.rules_performance import load_decisions
from mlnb.project.errors import SettingError
from mlnb.project.settings import load_settings
from mlnb.records import Records
from mlnb.records import utc_now as now
from mlnb.serving.compactor import Compactor
from mlnb.serving.labels import Label, LabelLog
from mlnb.serving.predictions import Prediction, PredictionLog

ANSWER = {"probability": 0.1, "decision": False}


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    records = Records(f"sqlite:///{tmp_path}/records.db")
    yield load_settings(tmp_path), records
    records.close()


def rule(kind, **table):
    return from_table(RULE_KINDS, "alerts", "r", {"kind": kind, **table})


def found(one, project, at=None, memory=None):
    result = evaluate(one, *project, memory, at)
    assert result.evaluation_error is None, result.evaluation_error
    return {f.subject: f for f in result.findings}


def test_a_service(toy, project, tmp_path):
    with run_server(toy, tmp_path / "log") as (_, url):
        service = lambda **more: rule("service", url=url, min_requests=5, minutes=1, **more)
        row, began = toy_project.example(toy), now()
        first = evaluate(service(p99_milliseconds=0.001), *project, {}, began)
        assert first.findings == [] and first.evaluation_error is None
        for _ in range(10):
            assert httpx.post(f"{url}/predict", json=row).status_code == 200
        slow = evaluate(service(p99_milliseconds=0.001), *project, first.memory, began + dt.timedelta(seconds=30))
        assert [f.subject for f in slow.findings] == ["latency"] and slow.findings[0].value > 0
        for _ in range(5):
            assert httpx.post(f"{url}/predict", content=b"{").status_code == 400
        again = evaluate(service(p99_milliseconds=0.001), *project, slow.memory, began + dt.timedelta(minutes=2))
        assert again.findings == [] and again.evaluation_error is None  # five requests since then, none of them timed
        unreadable = evaluate(rule("service", url=url, key="$NO_SUCH_KEY"), *project)
        assert "NO_SUCH_KEY is not set" in unreadable.evaluation_error
    (down,) = found(service(), project).values()
    assert down.subject == "down" and "does not answer" in down.words


def test_a_service_that_wants_a_key(toy, project, tmp_path, monkeypatch):
    monkeypatch.setenv("OPS_KEY", "k" * 40)
    with run_server(toy, tmp_path / "log", MLNB_KEYS="admin:" + "k" * 40, MLNB_KEYS_REQUIRED="true") as (_, url):
        assert "metrics answers 401" in evaluate(rule("service", url=url), *project).evaluation_error
        assert found(rule("service", url=url, key="$OPS_KEY"), project) == {}


class Scripted(BaseHTTPRequestHandler):
    def do_GET(self):
        status, text = self.server.says[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    "A service whose counts a test writes"
    server = HTTPServer(("127.0.0.1", 0), Scripted)
    server.says = {"/readyz": (200, "{}")}
    Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def counts(good, bad, unlogged=0, unreadable=0):
    lines = [
        f'mlnb_requests_total{{status="200",validity="valid"}} {good}',
        f'mlnb_requests_total{{status="503",validity="valid"}} {bad}',
    ]
    return 200, "\n".join([*lines, f"mlnb_unlogged {unlogged}", f"mlnb_unreadable {unreadable}", ""])


def test_what_failed_since_the_last_look(project, scripted):
    server, url = scripted
    service, at, memory, seen = rule("service", url=url, min_requests=50, minutes=10), now(), {}, []
    for good, bad, unlogged in (
        (1000, 900, 3),
        (1090, 910, 3),
        (1091, 910, 7),
        (2091, 910, 7),
        (3091, 910, 7),
        (60, 60, 0),
        (61, 60, 0),
    ):
        server.says["/metrics"] = counts(good, bad, unlogged)
        result = evaluate(service, *project, memory, at)
        memory, at = result.memory, at + dt.timedelta(minutes=11)
        seen.append([f.subject for f in result.findings])
    assert seen == [
        [],
        ["errors"],
        ["unlogged"],
        [],
        [],
        ["errors"],
        [],
    ]  # what was before is not news; the sixth is after a new start
    assert len(memory["counts"]) <= 3
    for _ in range(100):  # checks of every second
        memory, at = evaluate(service, *project, memory, at).memory, at + dt.timedelta(seconds=1)
    assert len(memory["counts"]) <= 12


def test_what_was_answered_and_cannot_be_read_back_is_told_once(project, scripted):
    server, url = scripted
    service, at, memory, seen = rule("service", url=url, min_requests=50, minutes=10), now(), {}, []
    for good, unreadable in (
        (100, 3),
        (110, 3),
        (120, 5),
        (130, 0),
        (5, 1),
    ):  # somebody removes them; then the service begins anew
        server.says["/metrics"] = counts(good, 0, 0, unreadable)
        result = evaluate(service, *project, memory, at)
        memory, at = result.memory, at + dt.timedelta(minutes=11)
        seen.append([(f.subject, f.value) for f in result.findings])
    assert seen == [[], [], [("unreadable", 2)], [], [("unreadable", 1)]]


def test_a_service_that_is_not_ready_or_no_service(project, scripted):
    server, url = scripted
    server.says["/readyz"] = 503, "predictions cannot be logged"
    (down,) = found(rule("service", url=url), project).values()
    assert "is not ready (503): predictions cannot be logged" in down.words
    server.says |= {"/readyz": (200, ""), "/metrics": (200, "<html> no metrics")}
    assert (
        evaluate(rule("service", url=url), *project).evaluation_error
        or evaluate(rule("service", url=url), *project).findings == []
    )
    server.says["/metrics"] = 404, ""
    assert "metrics answers 404" in evaluate(rule("service", url=url), *project).evaluation_error


@pytest.fixture
def dripping():
    "A server that sends what it is told, then a byte now and then for as long as somebody is there"

    class Drip(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 12)
            self.request.sendall(server.begins)
            while not server.stopped:
                self.request.sendall(b"x")
                time.sleep(0.1)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads, server.stopped, server.handle_error = True, False, lambda *_: None
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stopped = True
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "begins", [b"", b"HTTP/1.1 503 Busy\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "]
)
def test_a_service_that_never_ends_its_answer(dripping, begins):
    dripping.begins, said = begins, []

    def ask():
        try:
            said.append(http_get(f"http://127.0.0.1:{dripping.server_address[1]}/readyz", timeout=0.5))
        except OSError as e:
            said.append(str(e))

    Thread(target=ask, daemon=True).start()
    assert until(lambda: said) == ["it answers too slowly"]


def test_context_and_predictions_age(project, toy):
    settings, _ = project
    fresh = rule("freshness", snapshot_minutes=60, prediction_minutes=60)
    assert sorted(found(fresh, project)) == ["context", "prediction"]
    store = SnapshotStore(f"{settings.root}/.mlnb/storage/context")
    snapshot = SnapshotStore(str(toy / ".mlnb/storage/context"))
    as_of = snapshot.as_of_times()[-1]
    store.write(snapshot.newest(as_of))
    t = f"{now():%Y-%m-%dT%H:%M:%S}Z"
    log = PredictionLog.of(settings)
    log.append([Prediction("a", "k", "2013-07-01T00:00:00Z", t, "v1", "champion", t, 1.0, ANSWER, {}, {"x": 1.0})])
    log.close()
    assert list(found(fresh, project, as_of.item() + dt.timedelta(minutes=59))) == []
    assert list(found(fresh, project)) == ["context"]  # the decision is of 2013, the answer of now
    assert list(found(fresh, project, now() + dt.timedelta(minutes=61))) == ["context", "prediction"]
    old = rule("freshness", label_minutes=60)
    assert "outcome" in found(old, project)
    LabelLog.of(settings).append(
        [Label("k", 1.0, dt.datetime(2013, 7, 2, tzinfo=dt.UTC), dt.datetime.now(dt.UTC), "service")]
    )
    assert found(old, project) == {} and "outcome" in found(old, project, now() + dt.timedelta(minutes=61))


@pytest.mark.parametrize("ahead", [dt.timedelta(hours=1), dt.timedelta(days=366), dt.timedelta(days=36_500)])
def test_what_is_dated_ahead_of_the_clock_is_not_fresh(project, toy, ahead):
    "A clock that was ahead, or a decision_time that a caller made up, must not hide that nothing comes any more"
    settings, _ = project
    fresh = rule("freshness", snapshot_minutes=60, prediction_minutes=60, label_minutes=60)
    snapshot = SnapshotStore(str(toy / ".mlnb/storage/context"))
    later = now() + ahead
    SnapshotStore.of(settings).write(
        replace(snapshot.newest(snapshot.as_of_times()[-1]), as_of=np.datetime64(later, "s"))
    )
    log, t = PredictionLog.of(settings), f"{later:%Y-%m-%dT%H:%M:%S}Z"
    log.append([Prediction("a", "k", t, t, "v1", "champion", t, 1.0, ANSWER, {}, {"x": 1.0})])
    LabelLog.of(settings).append(
        [Label("k", 1.0, dt.datetime(2013, 7, 2, tzinfo=dt.UTC), later.replace(tzinfo=dt.UTC), "service")]
    )
    assert sorted(found(fresh, project)) == ["context", "outcome", "prediction"]
    t = f"{now():%Y-%m-%dT%H:%M:%S}Z"
    log.append([Prediction("b", "k", t, t, "v1", "champion", t, 1.0, ANSWER, {}, {"x": 1.0})])
    log.close()
    assert sorted(found(fresh, project)) == ["context", "outcome"]


def test_runs(project):
    settings, records = project
    runs = rule("runs")
    assert found(runs, project) == {}
    run = records.start_run(settings.name, {})
    assert found(runs, project) == {}  # it is running
    records.put_task(run, "train", status="failed", error="KeyError: 'delay'")
    records.end_run(run, "failed")
    assert "task train, KeyError: 'delay'" in found(runs, project)[settings.name].words
    assert found(rule("runs", failures=2), project) == {}
    records.end_run(records.start_run(settings.name, {}), "interrupted")
    records.start_run(settings.name, {})
    assert "the newest 2 runs" in found(rule("runs", failures=2), project)[settings.name].words
    assert "yet" in found(rule("runs", failures=3, hours=1), project)[f"{settings.name}: late"].words
    records.end_run(records.start_run(settings.name, {}), "succeeded")
    assert found(rule("runs", hours=1), project) == {}
    late = found(rule("runs", hours=1), project, now() + dt.timedelta(hours=30))[f"{settings.name}: late"]
    assert "30 hours" in late.words


def serve(log, day, n, shift=0.0, version="v1", hours=(0, 24)):
    rng = np.random.default_rng(0)
    at = [f"{day}T{hours[0] + i * (hours[1] - hours[0]) // n:02}:00:00Z" for i in range(n)]
    far = rng.normal(10 + shift, 2, n).tolist()
    said = (version, "champion", at[0], 1.0, ANSWER)
    log.append(
        [
            Prediction(f"{day}{version}{i}", "k", at[i], at[i], *said, {"carrier": "AB"[i % 2]}, {"far": far[i]})
            for i in range(n)
        ]
    )


def test_drift(project):
    settings, log = project[0], PredictionLog.of(project[0])
    assert found(rule("drift"), project) == {}  # nothing was served
    serve(log, "2013-07-03", 900)
    assert "no bundle with a reference" in evaluate(rule("drift"), *project).evaluation_error
    rng = np.random.default_rng(1)
    reference = {"far": rng.normal(10, 2, 9000), "carrier": np.array(["A", "B"] * 4500)}
    Profile.of(reference).write(settings.root / "products/bundle/reference.profile")
    assert found(rule("drift"), project) == {}
    serve(log, "2013-07-04", 900, shift=2.0)
    (far,) = found(rule("drift"), project).values()
    assert (
        far.subject == far.details["column"] == "far"
        and far.value > far.limit == 0.25
        and far.details["until"] == "2013-07-05T00:00:00"
    )
    assert found(rule("drift"), project, dt.datetime(2013, 7, 4, 23)) == {}  # that day has not ended
    serve(log, "2013-07-04", 900, version="v2")
    assert found(rule("drift", version="v2"), project) == {} and "far" in found(rule("drift", version="v1"), project)
    assert "carrier=A: far" in found(rule("drift", version="v1", segment="carrier=A"), project)
    evaluation_error = lambda **table: evaluate(rule("drift", **table), *project).evaluation_error
    assert "no answered prediction on 2013-07-04 is of version v1, segment carrier=Z" in evaluation_error(
        version="v1", segment="carrier=Z"
    )
    assert "no prediction in the log is of version 'v9'" in evaluation_error(version="v9")
    assert "did you mean 'far'" in evaluate(rule("drift", columns=["fra"]), *project).evaluation_error
    assert found(rule("drift", window="month", columns=["carrier"]), project) == {}
    log.close()


@pytest.fixture
def office(project):
    "A service that decides from 8 to 18, in a project whose bundle knows what is ordinary of it"
    rng, days = np.random.default_rng(1), np.datetime64("2013-05-01") + np.arange(60)
    seconds = np.sort(rng.integers(8 * 3600, 18 * 3600, (60, 300)), 1).astype("timedelta64[s]")
    known = pd.DataFrame({"time": (days[:, None] + seconds).ravel(), "far": rng.normal(10, 2, 18_000)})
    bundle = project[0].root / "products/bundle"
    Profile.of(known).write(bundle / "reference.profile")
    (bundle / "drift.json").write_bytes(calibrate(known).to_bytes())
    log = PredictionLog.of(project[0])
    yield project, log
    log.close()


def test_drift_of_office_hours(office):
    project, log = office
    serve(log, "2013-07-03", 600, hours=(8, 18))
    assert found(rule("drift"), project) == {}
    serve(log, "2013-07-04", 6000, shift=20.0, hours=(8, 18))
    assert list(found(rule("drift"), project)) == ["far"]
    assert list(found(rule("drift", window="hour"), project)) == ["far"]  # by its level


@pytest.mark.parametrize("options", [{}, {"version": "v1"}, {"segment": "carrier=A"}], ids=str)
def test_drift_that_only_the_hours_show(project, options):
    "A column that is within what it may be, and does not fit another one any more"
    rng, hours = np.random.default_rng(0), 24 * 40
    level = np.cumsum(rng.normal(0, 0.3, hours)) % 20
    rows = pd.DataFrame(
        {"level": np.repeat(level, 12), "double": np.repeat(2 * level, 12), "carrier": ["A", "B"] * (hours * 6)}
    )
    rows["time"] = pd.date_range("2013-05-25", periods=len(rows), freq="5min")
    bundle, log = project[0].root / "products/bundle", PredictionLog.of(project[0])
    for folder, known in {"": rows, "segments/carrier=A": rows[rows.carrier == "A"]}.items():
        Profile.of(known).write(bundle / folder / "reference.profile")
        (bundle / folder / "drift.json").write_bytes(calibrate(known).to_bytes())
    for day, far in {"2013-06-10": 0.0, "2013-06-11": 3.0}.items():
        at, said = f"{day}T00:00:00Z", ("v1", "champion", f"{day}T00:00:00Z", 1.0, ANSWER)
        served = rows[rows.time.dt.strftime("%Y-%m-%d") == day]
        times = served.time.dt.strftime("%Y-%m-%dT%H:%M:%SZ")
        values = zip(times, served.carrier, served.level + far, served.double, strict=True)
        log.append(
            [Prediction(t, "k", t, at, *said, {"carrier": c}, {"level": a, "double": b}) for t, c, a, b in values]
        )
        moved = found(rule("drift", **options), project)
        assert {one.details["column"] for one in moved.values()} == ({"level", "double"} if far else set())
    log.close()
    assert "misfit with other columns" in next(iter(moved.values())).words
    hours = alert_notebook.hourly_values(next(iter(moved.values())).details, project[0], "level")
    assert (
        list(hours.index) == [f"2013-06-11T{hour:02}" for hour in range(24)]
        and (hours["mean"] - hours["expected"]).mean() > 1
    )
    of_nothing = [({"window": "2013-06-11"}, "carrier"), ({"window": "2013-06-13"}, "level"), ({}, "level")]
    assert not any(len(alert_notebook.hourly_values(alert, project[0], column)) for alert, column in of_nothing)


def test_hours_of_a_part_of_the_log_are_those_of_the_days_around(project):
    settings, log = project[0], PredictionLog.of(project[0])
    for day in ("2013-06-30", "2013-07-01", "2013-07-02"):
        serve(log, day, 240)
    log.close()
    days = lambda source, **row_filter: {
        str(hour)[:10] for hour in DriftSource(source, settings, row_filter=RowFilter(**row_filter)).hours().hours
    }
    assert days("log:2013-07-01") == {"2013-06-30", "2013-07-01", "2013-07-02"} and days("log:2013-06") == {
        "2013-06-30",
        "2013-07-01",
    }
    assert (
        days("log:2013-07") == days("log") == days("log:2013-07-01T05") == days("log:2013-07-01", segment="carrier=A")
    )
    assert set(DriftSource("log:2013-07-01T05", settings).hours().rows) == {10}
    assert len(DriftSource("log:2013-07-01", settings, row_filter=RowFilter(segment="carrier=A")).hours().hours) == 72
    assert DriftSource("log:2013-07-01", settings).hours().columns["far"].numbers.tolist() == [10] * 72


def test_drift_that_cannot_be_judged_resolves_nothing(office):
    project, log = office
    alerts = AlertStore(project[1], "here")
    check = lambda: alerts.record([evaluate(rule("drift"), *project)], ["log"])
    serve(log, "2013-07-04", 600, shift=20.0, hours=(8, 18))
    check()
    serve(log, "2013-07-05", 20, hours=(8, 18))
    for _ in range(3):
        check()
    assert "2013-07-05 is not assessed: the window has 20 rows" in evaluate(rule("drift"), *project).evaluation_error
    assert "probability" in evaluate(rule("drift", columns=["probability"]), *project).evaluation_error
    assert sorted(alert["subject"] for alert in alerts.select()) == ["cannot look", "far"]


def test_a_version_of_today_is_no_trouble(project):
    log = PredictionLog.of(project[0])
    serve(log, "2013-07-03", 90)
    serve(log, "2013-07-04", 90, version="v2")
    log.close()
    assert found(rule("drift", version="v2"), project, dt.datetime(2013, 7, 4, 12)) == {}


def test_levels_of_too_few_rows_and_lost_columns(project):
    settings, log, rng = project[0], PredictionLog.of(project[0]), np.random.default_rng(1)
    reference = {"far": rng.normal(10, 2, 9000), "wind": rng.normal(10, 2, 9000), "never": np.full(9000, np.nan)}
    Profile.of(reference).write(settings.root / "products/bundle/reference.profile")
    serve(log, "2013-07-03", 900)
    (lost,) = found(rule("drift"), project).values()
    assert (
        lost.subject == "wind" and "wind is in the reference and in no prediction" in lost.words and lost.value is None
    )
    serve(log, "2013-07-04", 20)
    log.close()
    assert (
        "2013-07-04 is not assessed: in its 20 rows every column is too small"
        in evaluate(rule("drift"), *project).evaluation_error
    )


@pytest.mark.parametrize("segments", [(), ("vip", "maybe")], ids=["rows", "hours"])
def test_a_segment_is_the_same_rows_for_all(project, segments):
    settings, log = replace(project[0], profile_segments=segments), PredictionLog.of(project[0])
    far = np.random.default_rng(0).normal(30, 2, 900).tolist()
    for i in range(900):  # in some hours every row says `maybe`, in others not
        at, maybe = f"2013-07-04T{i * 24 // 900:02}:00:00Z", 2 if i < 450 or i % 5 else None
        raw = {"vip": bool(i % 2), "maybe": maybe}
        log.append([Prediction(str(i), "k", at, at, "v1", "champion", at, 1.0, ANSWER, raw, {"far": far[i]})])
    log.close()
    Profile.of({"far": np.random.default_rng(1).normal(10, 2, 9000)}).write(
        settings.root / "products/bundle/reference.profile"
    )
    for _ in ("lines", "parts"):
        for segment, rows in {"vip=true": 450, "vip=True": 450, "maybe=2": 810, "maybe=2.0": 810}.items():
            assert load_decisions(settings, "", segment).num_rows == rows
            assert read_windows("log", settings, row_filter=RowFilter(segment=segment))["log"].rows == rows
            assert list(found(rule("drift", segment=segment), (settings, project[1]))) == [f"{segment}: far"]
        Compactor.of(settings).run()


def test_a_rule_that_breaks_does_not_stop_another(project, monkeypatch):
    broken = rule("runs")
    monkeypatch.setattr(type(broken), "find", lambda self, at: 1 / 0)
    assert evaluate(broken, *project).evaluation_error == "ZeroDivisionError: division by zero"


def test_performance(project):
    settings, rng = replace(project[0], cost_false_negative=3.0), np.random.default_rng(0)
    log, project = PredictionLog.of(settings), (settings, project[1])
    below = rule("performance", metric="auc", below=0.6)
    assert found(below, project) == {}  # nothing was decided
    for day in range(1, 15):
        when, p = f"2013-07-{day:02}T12:00:00Z", rng.random(200)
        happened = rng.random(200) < (p if day <= 7 else 1 - p)  # from the eighth on the model is wrong
        answers = [{"probability": float(q), "decision": bool(q > 0.3)} for q in p]
        said = [(("v1", "champion", when, 1.0, answer), i) for i, answer in enumerate(answers)]
        log.append(
            [
                Prediction(f"{day}-{i}", f"{day}-{i}", when, when, *values, {"carrier": "AB"[i % 2]}, {})
                for values, i in said
            ]
        )
        then, late = dt.datetime(2013, 7, day, 20, tzinfo=dt.UTC), dt.datetime.now(dt.UTC)
        LabelLog.of(settings).append(
            [Label(f"{day}-{i}", float(happened[i]), then, late, "service") for i in range(200)]
        )
    assert found(below, project, dt.datetime(2013, 7, 9, 1)) == {}  # the first seven days are good
    (bad,) = found(below, project).values()
    assert (
        bad.subject == "auc"
        and bad.value < 0.4
        and bad.details["since"] == "2013-07-08T00:00:00"
        and "below 0.6" in bad.words
    )
    (max_deviation,) = found(
        rule("performance", metric="cost_per_1000", max_deviation=50.0, days=3, segment="carrier=A"), project
    ).values()
    assert max_deviation.subject == "carrier=A: cost_per_1000" and "was expected" in max_deviation.words
    assert found(rule("performance", metric="coverage", below=0.9), project) == {}
    assert found(rule("performance", below=0.6, version="v9"), project) == {}
    log.close()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"kind": "drift", "level": 3}, "setting 'level' has value 3; write level = \"slight\""),
        ({"kind": "drift", "columns": "distance"}, 'write columns = ["distance"]'),
        ({"kind": "drift", "segment": "origin"}, 'write segment = "origin=JFK"'),
        ({"kind": "drift", "severity": "fatal"}, 'write severity = "warning"'),
        ({"kind": "drift", "clear_after": 0}, "write clear_after = 2"),
        ({"kind": "drift", "clear_after": True}, "write clear_after = 2"),
        ({"kind": "service", "url": "host:3000"}, 'write url = "http://scores.internal:3000"'),
        ({"kind": "service", "key": "secret"}, 'write key = "$SCORES_KEY"'),
        ({"kind": "service", "max_error_rate": "1%"}, "write max_error_rate = 0.01"),
        ({"kind": "freshness"}, "write snapshot_minutes, prediction_minutes or label_minutes"),
        ({"kind": "runs", "hour": 3}, "unknown setting 'hour' (did you mean 'hours'?)"),
        ({"kind": "schedule"}, "one of drift, performance, service, freshness, runs"),
    ],
)
def test_a_wrong_rule_is_a_sentence(table, expected):
    with pytest.raises(SettingError) as error:
        from_table(RULE_KINDS, "alerts", "r", table)
    assert expected in str(error.value) and "pyproject.toml [tool.mlnb.alerts.r]" in str(error.value)


def test_an_environment_changes_a_rule(tmp_path):
    text = (
        '[tool.mlnb.alerts.inputs]\nkind = "drift"\n[tool.mlnb.env.production.alerts.inputs]\nseverity = "critical"\n'
    )
    (tmp_path / "pyproject.toml").write_text(text)
    assert [r.severity for r in load_rules(load_settings(tmp_path))] == ["warning"]
    assert [(r.kind, r.severity) for r in load_rules(load_settings(tmp_path, "production"))] == [("drift", "critical")]
