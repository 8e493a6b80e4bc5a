"""`mlnb alerts` as a user and cron call it."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import warm_cli
from listener import Listener

from mlnb.monitoring.alerts import AlertStore
from mlnb.monitoring.rules import RuleResult, load_rules
from mlnb.pipelines import recorder as recorders
from mlnb.project.settings import load_settings
from mlnb.records import Records
from mlnb.records import utc_now as now
from mlnb.serving.labels import Label, LabelLog
from mlnb.serving.predictions import Prediction, PredictionLog

TOML = """
[tool.mlnb]
[tool.mlnb.alerts.age]
kind = "freshness"
snapshot_minutes = 60
[tool.mlnb.alerts.pipeline]
kind = "runs"
clear_after = 1
[tool.mlnb.channels.file]
kind = "log"
[tool.mlnb.channels.hook]
kind = "webhook"
url = "$HOOK"
"""
RULES = """
[tool.mlnb.alerts.days]
kind = "drift"
[tool.mlnb.alerts.hours]
kind = "drift"
window = "hour"
[tool.mlnb.alerts.auc]
kind = "performance"
below = 0.6
[tool.mlnb.alerts.coverage]
kind = "performance"
metric = "coverage"
below = 0.0
[tool.mlnb.alerts.up]
kind = "service"
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").write_text(TOML)
    return tmp_path


def alerts(project, *arguments, **variables):
    environ = (
        {k: v for k, v in os.environ.items() if not k.startswith("MLNB_") or k == "MLNB_RUNTIME_DIR"}
        | {"COLUMNS": "150"}
        | variables
    )
    return warm_cli.run(["alerts", *arguments], cwd=project, env=environ)


def document(project, *arguments, **variables):
    done = alerts(project, *arguments, "--json", **variables)
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout), done.returncode


def test_a_trouble_from_its_first_check_to_its_end(project):
    assert document(project, "list") == ([], 0) and not (project / ".mlnb").exists()  # to look is not to make a store
    with Listener() as hook:
        checked, code = document(project, "check", HOOK=hook.url)
        assert code == 1 and checked["firing"] == 1 and checked["fired"] == [1]
        assert checked["told"] == {name: {"alerts": 1, "error": None, "note": None} for name in ("file", "hook")}
        assert [r["found"] for r in checked["rules"]] == [["context"], []] and len(hook.got) == 1
    shown = alerts(project, "check", HOOK="http://127.0.0.1:9/secret")
    assert (
        shown.returncode == 1 and "there is no feature snapshot yet" in shown.stdout and shown.stderr == ""
    )  # nothing new is to be told
    done = alerts(project, "ack", "1", "--note", "on it", "--user", "ada")
    assert done.stdout == "Alert 1 is acknowledged by ada: there is no feature snapshot yet\n"
    assert document(project, "check")[1] == 3  # somebody has it in hand, and no run has ended yet
    events = document(project, "show", "1")[0]["events"]
    assert [(e["what"], e["who"]) for e in events] == [("firing", None), ("acknowledged", "ada")]
    assert alerts(project, "resolve", "1", "--user", "ada").returncode == 0 and document(project, "list")[0] == []
    assert [a["state"] for a in document(project, "list", "--all")[0]] == ["resolved"]
    again, code = document(project, "check")  # it is not: no window, so it is found anew
    assert code == 1 and again["fired"] == [1] and "HOOK is not set" in again["told"]["hook"]["error"]
    page = alerts(project, "show", "1").stdout
    assert "acknowledged by ada: on it" in page and "HOOK is not set" in page and "hook: firing, waiting" in page


def test_failed_runs_come_and_go(project):
    settings = load_settings(project)
    records = Records(settings.url(settings.records))
    records.end_run(records.start_run(settings.name, {}), "failed")
    checked, _ = document(project, "check")
    assert "pipeline" in {a["rule"] for a in checked["alerts"]}
    records.end_run(records.start_run(settings.name, {}), "succeeded")
    records.close()
    checked, _ = document(project, "check")
    assert len(checked["resolved"]) == 1 and {a["rule"] for a in checked["alerts"]} == {"age"}


def test_a_failed_run_that_only_its_journal_knows_of(project, monkeypatch):
    monkeypatch.setattr(recorders, "START_DELAY_SECONDS", 60.0)  # the store is not opened before the recorder is closed
    settings = load_settings(project)
    recorder = recorders.Recorder(settings.url(settings.records), settings.path(".mlnb/runs"))
    run = recorder.start_run(settings.name, {})
    recorder.put_task(run, "train", status="failed", error="KeyError: 'delay'")
    recorder.end_run(run, "failed")
    recorder.close(wait=False)
    assert list(settings.path(".mlnb/runs").iterdir())
    checked, _ = document(project, "check")
    assert [
        "the newest run" in a["words"] and "KeyError" in a["words"]
        for a in checked["alerts"]
        if a["rule"] == "pipeline"
    ] == [True]
    assert not list(settings.path(".mlnb/runs").iterdir())


def test_a_project_without_rules(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    done = alerts(tmp_path, "check")
    output = [line.strip() for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (3, "")
    assert output == [
        "No data for 2 of 2 rules:",
        "● inputs: no day of predictions has ended yet",
        f"● pipeline: no run of pipeline '{tmp_path.name}' has ended yet",
    ]


@contextmanager
def idle_service():
    "The port of a server that is ready and has counted nothing"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_what_was_not_examined_comes_first_and_is_not_green(tmp_path):
    "Rules of every kind without anything to judge; of those that look, `age` alone finds something"
    toml = TOML.replace("snapshot_minutes = 60", "snapshot_minutes = 60\nprediction_minutes = 60") + RULES
    (tmp_path / "pyproject.toml").write_text(
        toml.replace("[tool.mlnb]\n", "[tool.mlnb]\ncost_false_negative = 3.0\n", 1)
    )
    settings = load_settings(tmp_path)
    with idle_service() as port, Listener() as hook:
        variables = {"MLNB_PORT": str(port), "HOOK": hook.url}
        checked, code = document(tmp_path, "check", **variables)
        reasons = {one["rule"]: one["unexamined"] for one in checked["rules"]}
        assert code == 1 and checked["unexamined"] == 6 and reasons["age"] is None
        assert reasons["hours"] == "no hour of predictions has ended yet" and reasons["auc"] == reasons["coverage"]
        assert reasons["coverage"] == "the label window of no day of decisions has closed yet"
        assert "first check" in reasons["up"] and "no run" in reasons["pipeline"]
        for alert in document(tmp_path, "list")[0]:
            assert alert["rule"] == "age"
            alerts(tmp_path, "ack", str(alert["id"]))
        shown = alerts(tmp_path, "check", **variables)
    assert shown.returncode == 3 and shown.stdout.startswith(
        "No data for 6 of 7 rules:\n  ● pipeline: no run of pipeline"
    )
    assert "had 0 requests since an earlier check, fewer than min_requests = 50" in shown.stdout
    assert shown.stdout.index("● up") < shown.stdout.index("acknowledged")
    log, day = PredictionLog.of(settings), "2013-07-01T05:00:00Z"
    output = ("v1", "champion", "", 1.0, {"probability": 0.5, "decision": True})
    log.append([Prediction(f"r{i}", f"e{i}", day, day, *output, {}, {"x": 1.0}) for i in range(20)])
    log.close()
    reasons = {one["rule"]: one["unexamined"] for one in document(tmp_path, "check")[0]["rules"]}
    assert (
        reasons["auc"] == "none of the decisions from 2013-07-01 to 2013-07-01 has a label"
        and reasons["coverage"] is None
    )
    now = datetime.now(UTC)
    LabelLog.of(settings).append([Label(f"e{i}", 1.0, now, now, "service") for i in range(20)])
    reasons = {one["rule"]: one["unexamined"] for one in document(tmp_path, "check")[0]["rules"]}
    assert (
        reasons["auc"]
        == "the labels of the decisions from 2013-07-01 to 2013-07-01 are all the same, so there is no auc"
    )


def test_a_rule_with_nothing_to_judge_ends_no_alert(tmp_path):
    "An alert on drift stays when the log that showed it has been removed"
    (tmp_path / "pyproject.toml").write_text('[tool.mlnb]\n[tool.mlnb.alerts.hours]\nkind = "drift"\nclear_after = 1\n')
    store = AlertStore.of(load_settings(tmp_path))
    (rule,) = load_rules(load_settings(tmp_path))
    store.record([RuleResult(rule, now(), [rule.finding("x", "x moved")], {})], [])
    store.close()
    checked, code = document(tmp_path, "check")
    assert (
        code == 1 and [alert["subject"] for alert in checked["alerts"]] == ["x"] and checked["rules"][0]["unexamined"]
    )


def test_open(project):
    document(project, "check")
    opened, code = document(project, "open", "1")
    assert code == 0 and opened == {
        "alert": 1,
        "notebook": str(project / "alerts/1.ipynb"),
        "new": True,
        "failed": None,
    }
    assert "no feature snapshot yet" in (project / "alerts/1.ipynb").read_text()
    assert alerts(project, "open", "1").stdout == f"{project}/alerts/1.ipynb\n"


def test_test(project):
    with Listener() as hook:
        assert alerts(project, "test", "hook", HOOK=hook.url).stdout == "Channel 'hook' was notified.\n"
        assert hook.got[0]["test"] is True and "nothing is wrong" in hook.got[0]["headline"]
    done = alerts(project, "test", "hook", HOOK="http://127.0.0.1:9/secret")
    assert done.returncode == 1 and "does not answer" in done.stderr and "secret" not in done.stderr + done.stdout
    assert document(project, "test", "hook")[1] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["show", "7"], 1, "there is no alert 7"),
        (["ack", "7"], 1, "see: mlnb alerts list --all"),
        (["open", "7"], 1, "there is no alert 7"),
        (["7"], 2, "mlnb alerts show 7"),
        (["lst"], 2, "did you mean 'list'"),
        (["show", "last"], 2, "'last' is not a valid integer"),
        (["test", "hok"], 2, "there is no channel 'hok' (did you mean 'hook'?)"),
    ],
)
def test_a_mistake_is_one_sentence(project, arguments, code, expected):
    done = alerts(project, *arguments)
    assert (
        done.returncode == code
        and expected in " ".join(done.stderr.split())
        and done.stdout == ""
        and "Traceback" not in done.stderr
    )


def test_a_wrong_rule_stops_the_check_before_it_does_anything(project):
    (project / "pyproject.toml").write_text(TOML.replace('kind = "runs"', 'kind = "runs"\nto = ["hok"]'))
    done = alerts(project, "check")
    assert (
        done.returncode == 2
        and "names channel 'hok' (did you mean 'hook'?)" in done.stderr
        and not (project / ".mlnb").exists()
    )


def test_help_imports_nothing_heavy(project):
    heavy = {"pandas", "sqlalchemy", "numpy", "mlnb.monitoring"}
    code = f"import sys; from mlnb.cli.alerts import alerts; print({heavy} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
    for name in ("check", "list", "show", "ack", "resolve", "open", "test"):
        assert "Example:" in alerts(project, name, "--help").stdout
