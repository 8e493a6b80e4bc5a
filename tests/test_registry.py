import datetime as dt
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest
from waiting import until

from mlnb.models import registry
from mlnb.models.registry import Tracking, log_pipeline_run
from mlnb.project.errors import TrackingError


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "made" / "bundle"
    (folder / "model").mkdir(parents=True)
    (folder / "bundle.json").write_text('{"name": "flights"}')
    (folder / "model" / "weights.safetensors").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def tracking(tmp_path):
    return Tracking(f"sqlite:///{tmp_path}/kept/mlflow.db")


RUN = {
    "id": "20260301T120000-ab12cd", "pipeline": "planes", "status": "failed", "resumed": None,
    "parameters": {"seed": 0, "odd & name": "x" * 9000, "date": dt.date(2026, 1, 1)} | {f"p{i}": i for i in range(150)},
    "started": dt.datetime(2026, 3, 1, 12), "ended": dt.datetime(2026, 3, 1, 12, 1),
    "code": {"commit": "1f" * 20, "dirty": True},
}  # fmt: skip


def pipeline_tasks(folder):
    (notebook := folder / "train.ipynb").write_text("{}")
    metrics = {"auc": 0.76, "loss": None, "by month.7 (July)": 0.7} | {f"m{i}": float(i) for i in range(1200)}
    done = {"name": "train", "status": "executed", "seconds": 58.5, "metrics": metrics, "notebook": str(notebook)}
    failed = {
        "name": "register",
        "status": "failed",
        "seconds": 0.5,
        "metrics": None,
        "notebook": str(folder / "gone.ipynb"),
    }
    return [
        {"name": "ingest", "status": "skipped", "seconds": 0.0, "metrics": {"rows": 7.0}, "notebook": None},
        done,
        failed,
    ]


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def whole_life(tracking, bundle, tmp_path):
    "Log, register, release, roll back, download"
    with tracking.run("flights", "first", parameters={"seed": 0, "device": "cpu"}, tags={"pipeline": "p1"}) as run:
        for epoch in (1, 2, 3):
            run.metrics({"train_loss": 1 / epoch, "valid_loss": 2 / epoch}, step=epoch)
        run.metrics({"auc": 0.76, "absent": None})
        first = tracking.register("flights", bundle, run)
    second = tracking.register("flights", bundle, run.id, tags={"why": "again"})
    assert (first, second) == (1, 2)

    logged_run = tracking.client.get_run(run.id)
    assert logged_run.info.status == "FINISHED" and logged_run.data.params == {"seed": "0", "device": "cpu"}
    assert (
        logged_run.data.metrics["auc"] == 0.76
        and "absent" not in logged_run.data.metrics
        and logged_run.data.tags["pipeline"] == "p1"
    )
    curve = tracking.client.get_metric_history(run.id, "valid_loss")
    assert [(m.step, m.value) for m in curve] == [(1, 2.0), (2, 1.0), (3, 2 / 3)]

    assert tracking.version_of("flights", "champion") is None
    for version in (2, 1):
        tracking.set_alias("flights", "champion", version)
        assert tracking.version_of("flights", "champion") == version
    for i, version in enumerate(("champion", 2)):
        copy = tracking.download("flights", version, tmp_path / f"copies/{i}")
        assert content(copy) == content(bundle)
    assert sorted(p.name for p in (tmp_path / "copies").iterdir()) == ["0", "1"]


def test_a_file_is_store_enough(tracking, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "made")
    whole_life(tracking, bundle, tmp_path)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["mlflow.db", "mlruns"]
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["bundle"]  # no ./mlruns


def test_two_that_download_at_once_have_one_bundle(tracking, bundle, tmp_path, monkeypatch):
    with tracking.run("flights") as run:
        version = tracking.register("flights", bundle, run)
    download = tracking.client.download_artifacts

    def slower(*arguments):
        copied = download(*arguments)
        shutil.copytree(bundle, tmp_path / "copy")  # the other process is done
        return copied

    monkeypatch.setattr(tracking.client, "download_artifacts", slower)
    assert content(tracking.download("flights", version, tmp_path / "copy")) == content(bundle)
    assert {p.name for p in tmp_path.iterdir()} == {"made", "kept", "copy"}


def _server(folder):
    locations = f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "0", "--workers", "1"]
    log = (folder / "server.log").open("wb")
    return subprocess.Popen(
        [*command, "--backend-store-uri", *locations], stdout=log, stderr=log, cwd=folder, start_new_session=True
    )


def _url(folder, server):
    "Where the server listens, once it does"
    assert server.poll() is None, (folder / "server.log").read_text()
    match = re.search(r"running on (http://127\.0\.0\.1:\d+)", (folder / "server.log").read_text())
    try:
        return match and urllib.request.urlopen(f"{match[1]}/health", timeout=5).url.removesuffix("/health")
    except OSError:
        return None


@contextmanager
def closed():
    "The URL of a port at which nobody listens, and nobody will"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.long
def test_a_server_does_the_same(bundle, tmp_path):
    server = _server(tmp_path)
    try:
        url = until(lambda: _url(tmp_path, server), "the MLflow server")
        whole_life(Tracking(url), bundle, tmp_path)
        run_id = log_pipeline_run(url, RUN, pipeline_tasks(tmp_path))
        assert [a.path for a in Tracking(url).client.list_artifacts(run_id, "notebooks")] == ["notebooks/train.ipynb"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def test_a_run_that_raises_is_kept_as_failed(tracking):
    with pytest.raises(ZeroDivisionError), tracking.run("flights") as run:
        run.metrics({"valid_loss": 1.0}, step=1)
        1 / 0
    assert tracking.client.get_run(run.id).info.status == "FAILED"


def test_a_closed_port_is_no_server():
    with closed() as url, pytest.raises(TrackingError) as e, Tracking(url).run("flights"):
        pass
    assert f"setting 'tracking' has value '{url}', which does not answer (" in str(e.value)
    assert 'write tracking = "sqlite:///.mlnb/mlflow.db" or tracking = "http://host:5000"' in str(e.value)


def test_a_port_that_never_answers_is_no_server():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TrackingError, match="timed out"):
            Tracking(f"http://127.0.0.1:{silent.getsockname()[1]}").version_of("flights", "champion")


@pytest.mark.parametrize("url", ["ftp//x", "foo://x", "http://", "sqlite:////proc/none/mlflow.db"])
def test_a_url_that_cannot_be_opened_is_a_wrong_setting(url):
    with pytest.raises(TrackingError, match="setting 'tracking' has value"):
        Tracking(url).version_of("flights", "champion")


def test_a_file_that_is_no_database_is_said(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database" * 100)
    with pytest.raises(TrackingError, match="which cannot be opened"):
        Tracking(f"sqlite:///{tmp_path}/mlflow.db").version_of("flights", "champion")


def test_what_is_not_there_is_named(tracking, bundle, tmp_path):
    with tracking.run("flights") as run:
        version = tracking.register("flights", bundle, run)
        with pytest.raises(TrackingError, match="nowhere does not exist"):
            tracking.register("flights", tmp_path / "nowhere", run)
    with pytest.raises(TrackingError, match="model 'flights' has no alias 'champion'"):
        tracking.download("flights", "champion", tmp_path / "copy")
    with pytest.raises(TrackingError, match="refuses"):
        tracking.download("flights", version + 1, tmp_path / "copy")
    with pytest.raises(TrackingError, match="exists already"):
        tracking.download("flights", version, bundle)
    with pytest.raises(TrackingError, match="refuses"):
        tracking.resume_run("0" * 32)
    assert content(bundle) and not (tmp_path / "copy").exists()


def test_nothing_is_printed(tmp_path):
    code = f"""
import logging
logging.basicConfig(level=logging.INFO)
from mlnb.models import registry
from mlnb.models.registry import Tracking, log_pipeline_run
with Tracking("sqlite:///{tmp_path}/mlflow.db").run("flights", parameters={{"a": 1}}) as run:
    run.metrics({{"auc": .5}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_run_of_the_pipeline_is_logged_once(tracking, tmp_path):
    ids = {log_pipeline_run(tracking.url, RUN, pipeline_tasks(tmp_path)) for _ in range(3)}
    (run_id,) = ids
    logged_run = tracking.client.get_run(run_id)
    assert tracking.client.get_experiment(logged_run.info.experiment_id).name == "planes"
    assert (logged_run.info.run_name, logged_run.info.status) == (
        RUN["id"],
        "FAILED",
    ) and logged_run.info.end_time - logged_run.info.start_time == 60_000
    params, metrics, tags = logged_run.data.params, logged_run.data.metrics, logged_run.data.tags
    assert len(params) == 153 and (params["seed"], params["date"], len(params["odd _ name"])) == (
        "0",
        "2026-01-01",
        6000,
    )
    assert (metrics["train/auc"], metrics["train/seconds"], metrics["register/seconds"]) == (0.76, 58.5, 0.5)
    assert "train/loss" not in metrics and "ingest/rows" not in metrics and len(metrics) == 1204
    assert (
        tags["mlnb.run"] == RUN["id"] and tags["mlflow.source.git.commit"] == "1f" * 20 and tags["mlnb.dirty"] == "True"
    )
    assert tags["mlnb.task.ingest"] == "skipped" and tags["mlnb.notebook.train"] == str(tmp_path / "train.ipynb")
    assert not tracking.client.list_artifacts(run_id)  # this machine has the notebooks already


def test_a_run_that_was_logged_in_part_is_completed(tracking, tmp_path, monkeypatch):
    def away(self, values):
        raise TrackingError("the server went away")

    with monkeypatch.context() as patched, pytest.raises(TrackingError):
        patched.setattr(registry.Run, "tags", away)
        log_pipeline_run(tracking.url, RUN, pipeline_tasks(tmp_path))
    run_id = log_pipeline_run(tracking.url, RUN, pipeline_tasks(tmp_path))
    logged_run = tracking.client.get_run(run_id)
    assert logged_run.info.status == "FAILED" and logged_run.data.metrics["train/auc"] == 0.76
    assert len(tracking.client.search_runs([logged_run.info.experiment_id])) == 1
