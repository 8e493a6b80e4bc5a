"""The pipeline as a Ploomber DAG, on real kernels; and Ploomber's own command on the same file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_project import make, notebook

from mlnb.pipelines.dag import load
from mlnb.project.settings import load_settings


@pytest.fixture
def project(tmp_path):
    return make(tmp_path / "project")


def test_status_build_and_upstream(project):
    dag = load(load_settings(project))
    assert list(dag["second"].upstream) == ["first"]
    assert "Source code" in str(dag.status()), "outdated, as Ploomber says it"
    dag.build()
    assert (project / "out" / "sum.txt").read_text() == "11"
    again = load(load_settings(project))
    again.render()
    assert {name: again[name].exec_status.name for name in again} == dict.fromkeys(
        ["first", "second", "other"], "Skipped"
    )


def test_a_failure_is_ploombers_error(project):
    from ploomber.exceptions import DAGBuildError

    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", "raise KeyError('gone')")
    with pytest.raises(DAGBuildError, match="KeyError"):
        load(load_settings(project)).build()


def test_stock_ploomber_runs_the_same_file(project):
    "What pipeline.yaml says is Ploomber's language: nobody is locked in"
    program = [Path(sys.executable).with_name("ploomber"), "build"]
    path = os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, "PLOOMBER_STATS_ENABLED": "false"}
    done = subprocess.run(program, cwd=project, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(project, "out", "sum.txt").read_text() == "11"
    assert json.loads(Path(project, "out", "first.ipynb").read_text())["cells"]
