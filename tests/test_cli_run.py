"""mlnb run as a program: what goes to which stream, and the exit code."""

import json
import os

import pytest
import warm_cli
from pipeline_project import make, notebook


@pytest.fixture
def project(tmp_path):
    return make(tmp_path / "project")


def mlnb(root, *words):
    return warm_cli.run(words, cwd=root, env=os.environ)


def test_json_is_alone_on_standard_output(project):
    done = mlnb(project, "run", "other", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert set(report) == {"run", "pipeline", "status", "seconds", "tasks", "notes"}
    assert (report["pipeline"], report["status"]) == ("planes", "succeeded")
    (task,) = report["tasks"]
    assert (
        set(task) == {"name", "status", "seconds", "attempts", "reason", "notebook", "error", "notes"}
        and task["status"] == "executed"
    )
    assert "other: executed" in done.stderr
    shown = mlnb(project / "nbs", "run", "other")
    assert shown.returncode == 0 and shown.stdout == "Nothing to do: 1 task is current\n"


def test_a_failed_task(project):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", "raise KeyError('gone')")
    done = mlnb(project, "run", "other", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["status"] == "failed" and "other.ipynb, cell [3]: KeyError: 'gone'" in report["tasks"][0]["error"]
    done = mlnb(project, "run", "other")
    assert done.returncode == 1 and "Task other failed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["othre"], "there is no task 'othre' (did you mean 'other'?)"),
        (["--param", "m=1"], "neither env.yaml nor any notebook declares a parameter 'm'"),
        (["--param", "n=x"], "parameter 'n' has value 'x' of type str"),
        (["--param", "n"], "is not of the form name=value"),
    ],
)
def test_mistakes(project, words, says):
    done = mlnb(project, "run", *words)
    assert done.returncode == 1 and says in done.stderr and done.stdout == "" and "Traceback" not in done.stderr
    assert not (project / "out").exists()
