"""Logging to MLflow by a process that is left behind."""

import fcntl
import os
import socket
import time

import pipeline_project
import pytest
import toy_project
from waiting import until

from mlnb.models import tracker
from mlnb.models.registry import Tracking
from mlnb.pipelines.recorder import Recorder
from mlnb.project.settings import load_settings
from mlnb.records import Records


@pytest.fixture
def settings(tmp_path, monkeypatch):
    for variable in [v for v in os.environ if v.startswith("MLNB_")]:
        monkeypatch.delenv(variable)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "planes"\n\n[tool.mlnb]\n')
    return load_settings(tmp_path)


@pytest.fixture
def records(settings):
    records = Records(settings.url(settings.records))
    yield records
    records.close()


def a_run(records, status="executed", end="succeeded"):
    run = records.start_run("planes", {"seed": 0})
    records.put_task(run, "train", status=status, seconds=1.0, metrics={"auc": 0.5})
    if end:
        records.end_run(run, end)
    return run


def logged(settings):
    "Runs in MLflow"
    client = Tracking(settings.url(settings.tracking)).client
    experiment = client.get_experiment_by_name("planes")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return sorted(r.data.tags["mlnb.run"] for r in runs)


def test_what_is_worth_logging_is_logged_once(settings, records):
    run, idle, going = a_run(records), a_run(records, "skipped"), a_run(records, end=None)
    assert tracker.log_pending_runs(settings) == 0 and tracker.log_pending_runs(settings) == 0
    assert logged(settings) == [run]
    assert (
        records.run(idle)["tracked"] == ""
        and records.run(going)["tracked"] is None
        and len(records.run(run)["tracked"]) == 32
    )
    records.end_run(going, "interrupted")
    assert tracker.log_pending_runs(settings) == 0 and logged(settings) == sorted([run, going])


def test_training_runs_are_children_of_their_pipeline_run(tmp_path):
    root = pipeline_project.make(tmp_path / "planes")
    train = """
    from pathlib import Path
    from mlnb.models.registry import Tracking
    from mlnb.project.settings import load_settings
    settings = load_settings()
    with Tracking(settings.url(settings.tracking)).run(settings.name, "training", tags={"kind": "x"}) as run:
        run.metrics({"loss": 0.5})
    Path(product["data"]).write_text(upstream["first"]["data"])
    """
    pipeline_project.notebook(root / "nbs/second.ipynb", 'upstream = ["first"]\nproduct = None\nextra = 1', train)
    done = toy_project.run(root, "-m", "mlnb.cli.main", "run", "second", "--json")
    assert done.returncode == 0, done.stderr
    settings = load_settings(root)
    until(lambda: tracker.log_pending_runs(settings) == 0)  # the process that the run left behind may have begun
    client = Tracking(settings.url(settings.tracking)).client
    runs = client.search_runs([client.get_experiment_by_name("planes").experiment_id])
    child, parent = sorted(runs, key=lambda r: "mlnb.run" in r.data.tags)
    tags = child.data.tags
    assert tags["mlflow.parentRunId"] == parent.info.run_id and child.data.metrics == {"loss": 0.5}
    assert (tags["mlnb.pipeline_run"], tags["mlnb.task"]) == (parent.data.tags["mlnb.run"], "second")
    assert len(tags["mlnb.data.first.data"]) == 16 and tags["kind"] == "x"


def test_a_process_is_left_behind(settings, records, monkeypatch):
    recorder = Recorder(settings.url(settings.records), settings.path(".mlnb/runs"))
    run = recorder.start_run("planes", {})
    recorder.put_task(run, "train", status="executed")
    recorder.end_run(run, "succeeded")
    recorder.close(wait=False)  # a journal alone knows of it
    log = tracker.start_tracker(settings, run)
    for _ in range(1200):
        if "is in MLflow" in log.read_text() and records.runs() and records.run(run)["tracked"]:
            break
        time.sleep(0.1)
    assert log.read_text() == f"run {run} is in MLflow\n" and logged(settings) == [run]
    assert log == settings.path(f".mlnb/runs/{run}/mlflow.log")


def test_a_server_that_is_away_is_tried_again_after_the_next_run(settings, records, monkeypatch, capsys):
    monkeypatch.chdir(settings.root)
    monkeypatch.setattr(os, "nice", lambda n: 0)
    first = a_run(records)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there, and nobody will
        monkeypatch.setenv("MLNB_TRACKING", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert tracker.main() == 1
    output = capsys.readouterr().out
    assert (
        "does not answer" in output
        and "The next mlnb run tries again." in output
        and records.run(first)["tracked"] is None
    )
    assert "does not answer" in tracker.last_problem(settings)
    monkeypatch.delenv("MLNB_TRACKING")
    second = a_run(records)
    assert tracker.main() == 0 and logged(settings) == sorted([first, second])


def test_one_run_that_fails_does_not_hold_up_the_others(settings, records, capsys):
    good, bad = a_run(records), a_run(records)
    records.put([("task", {"run_id": bad, "name": "train"}, {"metrics": ["damaged"]})])
    assert tracker.log_pending_runs(settings) == 1
    assert (
        f"run {bad} is not in MLflow" in capsys.readouterr().out
        and records.run(good)["tracked"]
        and not records.run(bad)["tracked"]
    )
    assert f"run {bad} is not in MLflow" in tracker.last_problem(settings)  # the next command says so
    records.remove([bad])
    assert tracker.log_pending_runs(settings) == 0 and tracker.last_problem(settings) is None


def test_two_at_once_log_once(settings, records):
    run = a_run(records)
    lock = settings.path(".mlnb/locks/tracker.lock")
    lock.parent.mkdir(parents=True)
    with lock.open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert tracker.log_pending_runs(settings) is None and records.run(run)["tracked"] is None
    assert tracker.log_pending_runs(settings) == 0


def test_it_can_be_switched_off(settings, monkeypatch):
    monkeypatch.setenv("MLNB_TRACK_RUNS", "false")
    assert tracker.start_tracker(load_settings(settings.root), "any") is None
    assert not settings.path(".mlnb/runs").exists()


def test_a_run_that_was_removed_meanwhile_does_not_come_back(settings, records):
    run = a_run(records)
    records.remove([run])
    records.set_tracked(run, "x")
    assert records.runs() == []
