"""`mlnb alerts` as a user and cron call it."""

import json
import os
import subprocess
import sys

import pytest
from listener import Listener

from mlnb.pipelines import recorder as recorders
from mlnb.project.settings import load_settings
from mlnb.records import Records

TOML = """
[tool.mlnb]
[tool.mlnb.alerts.age]
kind = "freshness"
context_minutes = 60
[tool.mlnb.alerts.pipeline]
kind = "runs"
clear_after = 1
[tool.mlnb.channels.file]
kind = "log"
[tool.mlnb.channels.hook]
kind = "webhook"
url = "$HOOK"
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").write_text(TOML)
    return tmp_path


def alerts(project, *arguments, **variables):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLNB_") or k == "MLNB_RUNTIME_DIR"} | {"COLUMNS": "150"} | variables
    command = [sys.executable, "-m", "mlnb.cli.main", "alerts", *arguments]
    return subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True)


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
    assert shown.returncode == 1 and "there is no context yet" in shown.stdout and shown.stderr == ""  # nothing new is to be told
    done = alerts(project, "ack", "1", "--note", "on it", "--by", "ada")
    assert done.stdout == "Alert 1 is acknowledged by ada: there is no context yet\n"
    assert document(project, "check")[1] == 0  # somebody has it in hand
    events = document(project, "show", "1")[0]["events"]
    assert [(e["what"], e["who"]) for e in events] == [("firing", None), ("acknowledged", "ada")]
    assert alerts(project, "resolve", "1", "--by", "ada").returncode == 0 and document(project, "list")[0] == []
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
    monkeypatch.setattr(recorders, "GRACE", 60.0)  # the store is not opened before the recorder is closed
    settings = load_settings(project)
    recorder = recorders.Recorder(settings.url(settings.records), settings.path(".mlnb/runs"))
    run = recorder.start_run(settings.name, {})
    recorder.put_task(run, "train", status="failed", error="KeyError: 'delay'")
    recorder.end_run(run, "failed")
    recorder.close(wait=False)
    assert list(settings.path(".mlnb/runs").iterdir())
    checked, _ = document(project, "check")
    assert ["the newest run" in a["words"] and "KeyError" in a["words"] for a in checked["alerts"] if a["rule"] == "pipeline"] == [True]
    assert not list(settings.path(".mlnb/runs").iterdir())


def test_a_project_without_rules(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    done = alerts(tmp_path, "check")
    assert (done.returncode, done.stdout) == (0, "Nothing is wrong: 2 rules looked.\n") and done.stderr == ""


def test_open(project):
    document(project, "check")
    opened, code = document(project, "open", "1")
    assert code == 0 and opened == {"alert": 1, "notebook": str(project / "alerts/1.ipynb"), "new": True, "failed": None}
    assert "no context yet" in (project / "alerts/1.ipynb").read_text()
    assert alerts(project, "open", "1").stdout == f"{project}/alerts/1.ipynb\n"


def test_test(project):
    with Listener() as hook:
        assert alerts(project, "test", "hook", HOOK=hook.url).stdout == "Channel 'hook' was told.\n"
        assert hook.got[0]["test"] is True and "nothing is wrong" in hook.got[0]["headline"]
    done = alerts(project, "test", "hook", HOOK="http://127.0.0.1:9/secret")
    assert done.returncode == 1 and "does not answer" in done.stderr and "secret" not in done.stderr + done.stdout
    assert document(project, "test", "hook")[1] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
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
def test_a_mistake_is_one_sentence(project, arguments, code, says):
    done = alerts(project, *arguments)
    assert done.returncode == code and says in " ".join(done.stderr.split()) and done.stdout == "" and "Traceback" not in done.stderr


def test_a_wrong_rule_stops_the_check_before_it_does_anything(project):
    (project / "pyproject.toml").write_text(TOML.replace('kind = "runs"', 'kind = "runs"\nto = ["hok"]'))
    done = alerts(project, "check")
    assert done.returncode == 2 and "names channel 'hok' (did you mean 'hook'?)" in done.stderr and not (project / ".mlnb").exists()


def test_help_imports_nothing_heavy(project):
    code = "import sys; from mlnb.cli.alerts import alerts; print({'pandas', 'sqlalchemy', 'numpy', 'mlnb.monitoring'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
    for name in ("check", "list", "show", "ack", "resolve", "open", "test"):
        assert "Example:" in alerts(project, name, "--help").stdout
