"""The state of alerts: two checks at once, a check that is killed, troubles that go and come back.

With MLNB_TEST_POSTGRESQL, see test_postgresql.py, on a server too; then not in parallel: there is one database."""

import datetime as dt
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from listener import Listener

from mlnb.monitoring.alerts import CLAIM_LEASE, EVALUATION_FAILED, AlertChanges, AlertStore
from mlnb.monitoring.notify import CheckResult, Delivery
from mlnb.monitoring.rules import RULE_KINDS, RuleResult, from_table
from mlnb.project.renames import RenamedWarning
from mlnb.records import Records
from mlnb.records import utc_now as now

POSTGRESQL = os.environ.get("MLNB_TEST_POSTGRESQL", "")
PROJECT = """
[tool.mlnb]
records = "{records}"
[tool.mlnb.alerts.age]
kind = "freshness"
snapshot_minutes = 60
clear_after = 1
[tool.mlnb.channels.hook]
kind = "webhook"
url = "$HOOK"
"""
CHECK = """
import sys
from mlnb.monitoring.notify import check
from mlnb.project.settings import load_settings
settings = load_settings()
print("ready", flush=True)
sys.stdin.readline()
print(len(check(settings).changes.fired))
"""


def emptied():
    engine = sa.create_engine(POSTGRESQL)
    with engine.begin() as connection:
        for table in ("alert_delivery", "alert_event", "alert_rule", "alert", "task", "run", "mlnb_version"):
            connection.execute(sa.text(f"drop table if exists {table}"))
    engine.dispose()
    return POSTGRESQL


@pytest.fixture(params=["sqlite", "postgresql"])
def project(tmp_path, request):
    "A project whose only rule finds something"
    if request.param == "postgresql" and not POSTGRESQL:
        pytest.skip("MLNB_TEST_POSTGRESQL names no server")
    records = f"sqlite:///{tmp_path}/records.db" if request.param == "sqlite" else emptied()
    (tmp_path / "pyproject.toml").write_text(PROJECT.format(records=records))
    return tmp_path, AlertStore(Records(records), tmp_path.name)


def start(root, hook):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLNB_")} | {"HOOK": hook.url}
    process = subprocess.Popen(
        [sys.executable, "-c", CHECK], cwd=root, env=env, stdin=-1, stdout=-1, stderr=-1, text=True
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def finish(process):
    message, errors = process.communicate("go\n", timeout=120)
    assert process.returncode == 0, errors
    return int(message)


def test_checks_at_once_tell_once(project):
    root, alerts = project
    with Listener() as hook:
        processes = [start(root, hook) for _ in range(3)]
        with ThreadPoolExecutor() as pool:
            fired = list(pool.map(finish, processes))
    assert sum(fired) == 1 and [len(m["alerts"]) for m in hook.got] == [1]
    (alert,) = alerts.select()
    assert alert["state"] == "firing" and [d["status"] for d in alerts.get(alert["id"])["deliveries"]] == ["sent"]
    alerts.close()


def test_killed_while_it_tells(project):
    root, alerts = project
    with Listener(on_post=lambda: os.kill(process.pid, signal.SIGKILL)) as hook:
        process = start(root, hook)
        process.communicate("go\n", timeout=120)
        assert process.returncode == -signal.SIGKILL and len(hook.got) == 1
        (alert,) = alerts.select()
        assert [d["status"] for d in alerts.get(alert["id"])["deliveries"]] == ["waiting"]
        hook.on_post = lambda: None
        assert finish(start(root, hook)) == 0 and len(hook.got) == 2  # once more rather than never
        assert finish(start(root, hook)) == 0 and len(hook.got) == 2
    alerts.close()


def test_killed_between_noting_and_telling(project):
    root, alerts = project
    with Listener() as hook:
        code = (
            "from mlnb.monitoring import notify; import os; notify.notify = lambda *_: os.kill(os.getpid(), 9)\n"
            + CHECK
        )
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=os.environ | {"HOOK": hook.url}, input="go\n", text=True
        )
        assert process.returncode == -9 and hook.got == [] and len(alerts.select()) == 1
        assert finish(start(root, hook)) == 0 and len(hook.got) == 1
        assert finish(start(root, hook)) == 0 and len(hook.got) == 1
    alerts.close()


def test_a_channel_that_comes_back_is_told(project):
    root, alerts = project
    with Listener(503) as hook:
        finish(start(root, hook))
        finish(start(root, hook))
        (alert,) = alerts.select()
        (delivery,) = alerts.get(alert["id"])["deliveries"]
        assert (delivery["status"], delivery["attempts"], delivery["error"]) == ("waiting", 2, "the server answers 503")
        hook.status = 200
        finish(start(root, hook))
        finish(start(root, hook))
    assert len(hook.got) == 3
    alerts.close()


RULE = from_table(RULE_KINDS, "alerts", "inputs", {"kind": "drift"})


def look(alerts, *subjects, started=None, evaluation_error=None, window=None, rule=RULE, **details):
    details |= {"since": window} if window else {}
    findings = [rule.finding(s, f"{s} moved", value=float("inf"), details=details) for s in subjects]
    return alerts.record([RuleResult(rule, started or now(), findings, {"n": 1}, evaluation_error)], ["ops"])


def test_a_check_that_began_before_another_was_noted_changes_nothing(project):
    _, alerts = project
    early = now()
    look(alerts, "a")
    assert look(alerts, started=early) == AlertChanges([], []) and look(alerts, "b", started=early) == AlertChanges(
        [], []
    )
    assert [(a["subject"], a["missed"]) for a in alerts.select()] == [("a", 0)]
    alerts.close()


def test_a_clock_that_was_set_back_holds_nothing_up(project):
    _, alerts = project
    look(alerts, "a")
    with alerts.records.engine.begin() as connection:
        connection.execute(alerts.rule.update().values(checked=now() + dt.timedelta(days=300)))
    assert look(alerts, "a", "b") == AlertChanges([2], [])
    alerts.close()


def test_gone_and_back(project):
    _, alerts = project
    assert look(alerts, "a") == AlertChanges([1], []) and look(alerts) == AlertChanges([], [])
    assert look(alerts, "a") == AlertChanges([], []) and alerts.get(1)["missed"] == 0  # it flickers
    assert look(alerts) == AlertChanges([], []) and look(alerts) == AlertChanges([], [1])
    assert look(alerts) == AlertChanges([], []) and alerts.select() == []
    assert look(alerts, "a") == AlertChanges([1], [])
    alert = alerts.get(1)
    assert (alert["episode"], alert["seen"], alert["state"], alert["ended"]) == (2, 1, "firing", None)
    assert [e["what"] for e in alert["events"]] == ["firing", "resolved", "firing"]
    assert [(d["episode"], d["status"]) for d in alert["deliveries"]] == [(1, "dropped"), (2, "waiting")]
    alerts.close()


def test_what_a_person_resolved_stays_so_for_its_window(project):
    _, alerts = project
    look(alerts, "a", window="2013-07-04")
    alerts.resolve(1, "ada", "a holiday")
    assert look(alerts, "a", window="2013-07-04") == AlertChanges([], []) and alerts.get(1)["state"] == "resolved"
    assert look(alerts, "a", window="2013-07-05") == AlertChanges([1], [])
    alerts.acknowledge(1, "ada")
    assert look(alerts, "a", window="2013-07-06") == AlertChanges([], []) and alerts.get(1)["state"] == "acknowledged"
    alerts.close()


def test_what_a_person_resolved_stays_so_for_its_run(project):
    _, alerts = project
    look(alerts, "flights", run="R1")
    alerts.resolve(1, "ada", "the disk was full")
    assert look(alerts, "flights", run="R1") == AlertChanges([], []) and look(
        alerts, "flights", run="R2"
    ) == AlertChanges([1], [])
    alerts.close()


def test_what_went_away_by_itself_comes_back_in_a_window_that_grows(project):
    _, alerts = project
    days = lambda n: {"window": "2026-01-01", "until": f"2026-01-{n:02}"}
    assert (
        look(alerts, "auc", **days(5)) == AlertChanges([1], [])
        and look(alerts) == AlertChanges([], [])
        and look(alerts) == AlertChanges([], [1])
    )
    assert look(alerts, "auc", **days(5)) == AlertChanges([1], [])  # nobody has said that this is settled
    alerts.resolve(1, "ada")
    assert look(alerts, "auc", **days(5)) == AlertChanges([], []) and look(alerts, "auc", **days(6)) == AlertChanges(
        [1], []
    )
    look(alerts)
    assert look(alerts) == AlertChanges([], [1]) and look(alerts, "auc", **days(6)) == AlertChanges(
        [1], []
    )  # a person's word was of before
    alerts.close()


def test_a_blind_rule_forgets_nothing_and_sees_again(project):
    _, alerts = project
    look(alerts, "a")
    for _ in range(5):
        look(alerts, evaluation_error="no log")
    assert {a["subject"]: (a["state"], a["missed"]) for a in alerts.select()} == {
        "a": ("firing", 0),
        EVALUATION_FAILED: ("firing", 0),
    }
    look(alerts, "a")
    assert look(alerts, "a") == AlertChanges([], [2]) and alerts.memories() == {"inputs": {"n": 1}}
    alerts.close()


def test_alerts_of_a_rule_that_is_gone_end(project):
    _, alerts = project
    other = from_table(RULE_KINDS, "alerts", "other", {"kind": "runs"})
    look(alerts, "a")
    assert look(alerts, "b", rule=other) == AlertChanges([2], [1])
    assert alerts.get(1)["events"][-1]["note"] == "the rule is no longer in the settings"
    alerts.close()


def test_deployments_do_not_see_each_other(project):
    _, alerts = project
    others = AlertStore(alerts.records, "others")
    look(alerts, "a")
    look(others, "a")
    assert len(alerts.select()) == len(others.select()) == 1 and [a["id"] for a in others.claim_deliveries("ops")] == [
        2
    ]
    assert look(others) == AlertChanges([], []) and look(others) == AlertChanges([], [2]) and len(alerts.select()) == 1
    alerts.close()


def test_a_claim_of_another_machine_ends(project):
    _, alerts = project
    look(alerts, "a")
    assert len(alerts.claim_deliveries("ops")) == 1
    table = alerts.delivery
    with alerts.records.engine.begin() as connection:
        connection.execute(table.update().values(claimed="1@elsewhere"))
    assert alerts.claim_deliveries("ops") == []
    with alerts.records.engine.begin() as connection:
        connection.execute(table.update().values(claimed_at=now() - CLAIM_LEASE * 2))
    assert len(alerts.claim_deliveries("ops")) == 1
    alerts.close()


def test_odd_texts_and_many_subjects(project):
    _, alerts = project
    names = ["x" * 10**6, "ü\0\ud800", *map(str, range(3000))]
    began = time.process_time()
    assert len(look(alerts, *names).fired) == len(names) and look(alerts, *names) == AlertChanges([], [])
    assert len(alerts.select()) == len(names) and time.process_time() - began < 60
    alerts.close()


def test_members_of_release_0_1_work_with_a_warning():
    alerts = AlertStore(Records("sqlite:///:memory:"), "p")
    with pytest.warns(RenamedWarning, match="AlertStore.note is called 'record'"):
        assert alerts.note([], []) == AlertChanges([], [])
    result = CheckResult([], AlertChanges([], []), {"ops": Delivery(1)}, [])
    with pytest.warns(RenamedWarning, match="CheckResult.told is called 'deliveries'"):
        assert result.told == result.deliveries
