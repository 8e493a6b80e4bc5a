"""`mlnb runs`, `predictions`, `drift` and `performance` for an account that may only read the project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from toy_project import environment

from mlnb.data.profiles import Profile
from mlnb.project.settings import load_settings
from mlnb.records import Records
from mlnb.serving.predictions import Prediction, PredictionLog

ROWS = 240
SETPRIV = shutil.which("setpriv")
ROOT = os.getuid() == 0
AS_READER = [SETPRIV, "--bounding-set", "-dac_override,-fowner"] if ROOT else []  # root that obeys modes

pytestmark = pytest.mark.skipif(ROOT and SETPRIV is None, reason="root ignores modes, and setpriv is not installed")


def mlnb(project, *words, reader=False) -> subprocess.CompletedProcess:
    command = [*(AS_READER if reader else []), sys.executable, "-m", "mlnb.cli.main", *words]
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


def append(project, first: int, rows: int):
    times = np.datetime64("2013-07-01T00:30") + (first + np.arange(rows)) * np.timedelta64(1, "h")
    texts = [f"{np.datetime_as_string(time, 's')}Z" for time in times]
    log = PredictionLog(project / ".mlnb/predictions")
    fields, answer = enumerate(texts, first), {"probability": 0.4, "decision": True}
    log.append(
        [
            Prediction(f"r{i}", f"e{i}", t, t, "v1", "champion", "", 1.0, answer, {"distance": i % 24}, {})
            for i, t in fields
        ]
    )
    log.close()


@pytest.fixture
def project(tmp_path):
    "A project with predictions, some of them profiled, labels, a reference and a run; nobody may write to it"
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\ncost_false_negative = 3.0\n")
    append(tmp_path, 0, ROWS)
    labels = pd.DataFrame({"entity": [f"e{i}" for i in range(ROWS)], "value": np.arange(ROWS) % 2})
    labels["observed_at"] = pd.Timestamp("2013-07-20", tz="UTC")
    labels.to_parquet(tmp_path / "labels.parquet", index=False)
    Profile.of(pd.DataFrame({"distance": np.arange(ROWS) % 24})).write(tmp_path / "reference.bin")
    records = Records(load_settings(tmp_path).url(load_settings(tmp_path).records), tmp_path)
    run = records.start_run("delays", {"seed": 1})
    records.end_run(run, "succeeded")
    records.close()
    mlnb(tmp_path, "labels", "add", "labels.parquet")
    mlnb(tmp_path, "compact")
    append(tmp_path, ROWS, 24)  # is in no profile yet
    with closed(tmp_path):
        yield tmp_path


class closed:
    "Nothing in a folder may be written while the block runs"

    def __init__(self, folder: Path):
        self.modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")]}

    def __enter__(self):
        for path, mode in self.modes.items():
            path.chmod(mode & ~0o222)

    def __exit__(self, *error):
        for path, mode in self.modes.items():
            path.chmod(mode)


def content(project) -> dict:
    return {str(path): path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}


def test_every_command_reads_and_says_how_old_its_data_is(project):
    before = content(project)
    runs = mlnb(project, "runs", "--pipeline", "delays", "--json", reader=True)
    assert [run["status"] for run in json.loads(runs.stdout)] == ["succeeded"]
    assert "Read-only access: the records were written at" in runs.stderr
    assert "delays" in mlnb(project, "runs", "show", json.loads(runs.stdout)[0]["id"], reader=True).stdout
    rows = mlnb(project, "predictions", "--limit", "3", "--json", reader=True)
    assert [row["entity"] for row in json.loads(rows.stdout)] == ["e261", "e262", "e263"]
    for words in (("performance",), ("drift", "log", "--reference", "reference.bin", "--window", "day")):
        done = mlnb(project, *words, "--json", reader=True)
        assert "Read-only access: the newest prediction was logged at" in done.stderr and "ago)" in done.stderr
        assert json.loads(done.stdout)
    windows = json.loads(done.stdout)["windows"]
    assert sum(window["rows"] for window in windows) == ROWS + 24  # those in no profile, too
    assert json.loads(mlnb(project, "alerts", "list", "--json", reader=True).stdout) == []
    assert content(project) == before


def test_with_write_access_nothing_is_said(project):
    for path in [project, *project.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
    for words in (("runs",), ("predictions",), ("performance",)):
        assert "Read-only" not in mlnb(project, *words).stderr
