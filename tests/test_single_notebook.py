"""`mlnb run NOTEBOOK`: a notebook that belongs to no pipeline, in and outside of a project, on real kernels."""

import json
import os
import signal
import subprocess
import sys

import pytest
import warm_cli
from pipeline_project import make, notebook
from waiting import until

REPORT = "import os\nprint(os.path.basename(os.getcwd()), month, name)"


@pytest.fixture
def project(tmp_path):
    root = make(tmp_path / "project")
    notebook(root / "notebooks" / "report.ipynb", "month: int = 1\nname = 'a'", REPORT, "assert month != 2, 'no data'")
    return root


def mlnb(root, *words, **variables):
    return warm_cli.run(words, cwd=root, env=os.environ | variables)


def cells(path):
    return json.loads(path.read_text())["cells"]


def text(path, position):
    return "".join("".join(o.get("text", "")) for o in cells(path)[position]["outputs"])


def runs(root):
    return json.loads(mlnb(root, "runs", "--json").stdout)


def test_parameters_output_and_records(project):
    before = (project / "notebooks" / "report.ipynb").read_text()
    words = ("notebooks/report.ipynb", "-p", "month=3", "-p", "name=007", "-o", "out/march.ipynb")
    done = mlnb(project, "run", *words)
    assert done.returncode == 0, done.stderr
    assert "The executed notebook is out/march.ipynb" in done.stdout
    march = project / "out" / "march.ipynb"
    tags = [c["metadata"].get("tags") for c in cells(march)]
    assert tags[:2] == [["parameters"], ["injected-parameters"]]
    assert text(march, 2) == "notebooks 3 007\n"
    assert (project / "notebooks" / "report.ipynb").read_text() == before
    (run,) = runs(project)
    assert run["parameters"] == {"month": 3, "name": "007"} and run["status"] == "succeeded"
    assert run["selection"]["notebook"] == "notebooks/report.ipynb"
    assert "notebooks/report.ipynb" in mlnb(project, "runs").stdout
    done = mlnb(project / "notebooks", "run", "report.ipynb", MLNB_NOTEBOOK_FOLDER="project")
    newest = runs(project)[0]
    executed = project / ".mlnb" / "runs" / newest["id"] / "report.ipynb"
    assert done.returncode == 0 and text(executed, 1) == "project 1 a\n"
    assert newest["changed"] == {"month": [3, 1], "name": ["007", "a"]}


def test_failure_and_unknown_parameter(project):
    done = mlnb(project, "run", "notebooks/report.ipynb", "-p", "month=2", "-p", "mnth=4", "-o", "x.ipynb", "--json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "report.ipynb declares no parameter 'mnth' (did you mean 'month'?)" in done.stderr
    (task,) = json.loads(done.stdout)["tasks"]
    assert f"cell [4]: AssertionError: no data; the executed copy is {project / 'x.ipynb'}" in task["error"]
    assert any("papermill-error-cell-tag" in c["metadata"].get("tags", []) for c in cells(project / "x.ipynb"))
    resumed = mlnb(project, "run", "--resume", "last")
    assert resumed.returncode == 1 and "no data" in resumed.stderr
    assert runs(project)[0]["parameters"] == {"month": 2, "mnth": 4, "name": "a"}


def test_no_parameters_cell_in_no_project(tmp_path):
    notebook(tmp_path / "plain" / "a.ipynb", None, "print(x)")
    document = json.loads((tmp_path / "plain" / "a.ipynb").read_text())
    (tmp_path / "plain" / "a.ipynb").write_text(json.dumps(document | {"metadata": {}}))  # no kernelspec
    done = mlnb(tmp_path / "plain", "run", "a.ipynb", "-y", "{x: [1, 2]}", "-o", "a.ipynb")
    assert done.returncode == 0, done.stderr
    assert "a.ipynb has no cell tagged 'parameters', so x is set at its top" in done.stderr
    assert text(tmp_path / "plain" / "a.ipynb", 1) == "[1, 2]\n"  # in place, as with papermill
    (run,) = runs(tmp_path / "plain")
    assert run["pipeline"] == "plain" and (tmp_path / "plain" / ".mlnb" / ".gitignore").read_text() == "*\n"
    done = mlnb(tmp_path / "plain", "run", "a.ipynb", "-r", "x=1", "-o", "a.ipynb")
    assert [c["metadata"]["tags"] for c in cells(tmp_path / "plain" / "a.ipynb")] == [["injected-parameters"], []]
    assert text(tmp_path / "plain" / "a.ipynb", 1) == "1\n"
    assert mlnb(tmp_path, "run").returncode == 2  # a pipeline needs a project


def test_a_source_that_was_edited_while_it_ran_is_kept(tmp_path):
    edit = "open('a.ipynb', 'a').write('\\n')"
    source = notebook(tmp_path / "a.ipynb", None, edit)
    done = mlnb(tmp_path, "run", "a.ipynb", "-o", "a.ipynb")
    assert done.returncode == 1 and "was edited while it ran, so it is not overwritten" in done.stderr
    assert not cells(source)[0]["outputs"]


def test_a_task_is_run_as_a_task(project):
    done = mlnb(project, "run", "nbs/other.ipynb")
    assert done.returncode == 0 and "nbs/other.ipynb is task 'other' of pipeline.yaml" in done.stderr
    assert (project / "out" / "other.ipynb").exists()
    done = mlnb(project, "run", "nbs/other.ipynb", "-o", "x.ipynb")
    assert done.returncode == 2 and "-o, -r, -y and -f are for one notebook that is no task" in done.stderr
    done = mlnb(project, "run", "first", "notebooks/report.ipynb")
    assert done.returncode == 2 and "is no task of pipeline.yaml" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["notebooks/reprt.ipynb"], "no notebook notebooks/reprt.ipynb (did you mean 'notebooks/report.ipynb'?)"),
        (["notebook/report.ipynb"], "(did you mean 'notebooks/report.ipynb'?)"),
        (["notebooks/"], "notebooks/ is a folder; name one notebook in it"),
        (["pipeline.yaml/"], "is not a notebook"),
        (["notebooks/report.ipynb", "-p", "month=March"], "parameter 'month' has value 'March' of type str"),
        (["notebooks/report.ipynb", "-p", "month"], "parameter 'month' is not of the form name=value"),
        (["notebooks/report.ipynb", "-p", "month", "3"], "write -p month=VALUE"),
        (["notebooks/report.ipynb", "-y", "[1]"], "-y has value [1]; write names with values"),
        (["notebooks/report.ipynb", "-o", "out.html"], "write for example: -o out.ipynb"),
        (["notebooks/report.ipynb", "-o", "notebooks"], "is a folder; write a file in it: -o notebooks/report.ipynb"),
        (["notebooks/report.ipynb", "--to", "first"], "--to and --from choose tasks"),
    ],
)
def test_mistakes(project, words, says):
    done = mlnb(project, "run", *words)
    assert done.returncode in (1, 2) and says in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert not (project / ".mlnb" / "runs").exists()


def test_a_notebook_has_no_plan(project):
    done = mlnb(project, "plan", "notebooks/report.ipynb")
    assert done.returncode == 2 and "mlnb run notebooks/report.ipynb always runs it" in done.stderr
    assert mlnb(project, "plan", "nbs/other.ipynb").stdout.startswith("● other")


def test_two_at_once(project):
    notebook(project / "notebooks" / "slow.ipynb", "month = 1", "import time, os; time.sleep(1)", "print(month)")
    script = "from mlnb.cli.main import main; main()"
    processes = []
    for month in (1, 2):
        words = ["run", "notebooks/slow.ipynb", "-p", f"month={month}", "-o", f"{month}.ipynb"]
        processes.append(
            subprocess.Popen([sys.executable, "-c", script, *words], cwd=project, stderr=subprocess.PIPE, text=True)
        )
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read()
        process.stderr.close()
    assert [text(project / f"{month}.ipynb", 3) for month in (1, 2)] == ["1\n", "2\n"]
    assert len(runs(project)) == 2


@pytest.mark.long
def test_resume_after_a_fix_and_ctrl_c(project):
    source = notebook(
        project / "notebooks" / "slow.ipynb", "month = 1", "import time; time.sleep(1.2); n = 5", "print(n / 0, month)"
    )
    done = mlnb(project, "run", "notebooks/slow.ipynb", "-p", "month=3", "-o", "slow.ipynb")
    assert done.returncode == 1 and "resumes after cell [3]" in done.stderr
    source.write_text(source.read_text().replace("n / 0", "n / 1"))
    done = mlnb(project, "run", "--resume", "last")
    assert done.returncode == 0 and "resumes after cell [3]" in done.stderr
    assert text(project / "slow.ipynb", 3) == "5.0 3\n"
    started = project / "notebooks" / "started"
    notebook(project / "notebooks" / "long.ipynb", None, "open('started', 'w').close()\nimport time; time.sleep(60)")
    script = "from mlnb.cli.main import main; main()"
    words = ["run", "notebooks/long.ipynb", "-o", "long.ipynb"]
    process = subprocess.Popen([sys.executable, "-c", script, *words], cwd=project, stderr=subprocess.PIPE, text=True)
    until(started.exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "interrupted" in process.stderr.read()
    process.stderr.close()
    assert (project / "long.ipynb").exists() and runs(project)[0]["status"] == "interrupted"
