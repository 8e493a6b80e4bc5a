"""`.py` files with cells are notebooks: as tasks of a pipeline, alone, checked, fingerprinted and resumed."""

import json
import os
from textwrap import dedent

import pytest
import warm_cli
from pipeline_project import edit, make, notebook

from mlnb.notebooks import cells
from mlnb.pipelines.spec import read
from mlnb.project.errors import NotebookError, PipelineError
from mlnb.project.settings import load_settings

SECOND = dedent('''\
    # ---
    # jupyter:
    #   jupytext:
    #     formats: ipynb,py:percent
    # ---

    # %% [markdown]
    # The sum

    # %% tags=["parameters"]
    upstream = ["first"]
    product = None
    extra = 1

    # %%
    # %time started = 1
    import time; time.sleep(1.1)

    # %%
    from pathlib import Path

    total = int(Path(upstream["first"]["data"]).read_text()) + extra
    Path(product["data"]).write_text(str(total))
''')


@pytest.fixture
def project(tmp_path):
    root = make(tmp_path / "project")
    (root / "nbs" / "second.ipynb").unlink()
    (root / "nbs" / "second.py").write_text(SECOND)
    edit(root / "pipeline.yaml", "nbs/second.ipynb", "nbs/second.py")
    return root


def mlnb(root, *words):
    return warm_cli.run(words, cwd=root, env=os.environ)


def states(root):
    return {t["name"]: t["state"] for t in json.loads(mlnb(root, "plan", "--json").stdout)["tasks"]}


def test_a_task(project):
    source = project / "nbs" / "second.py"
    done = mlnb(project, "run")
    assert done.returncode == 0, done.stderr
    assert (project / "out" / "sum.txt").read_text() == "11" and source.read_text() == SECOND
    executed = json.loads((project / "out" / "second.ipynb").read_text())
    assert "jupytext" not in executed["metadata"]  # which would pair it with a script
    assert executed["metadata"]["kernelspec"]["name"] == "python3"
    kinds = [(c["cell_type"], c["metadata"].get("tags")) for c in executed["cells"][:3]]
    assert kinds == [("markdown", []), ("code", ["parameters"]), ("code", ["injected-parameters"])]
    assert "second" not in mlnb(project, "check").stdout
    edit(source, "# The sum", "# The sum of both")
    edit(source, "total = int", "total  =  int")
    assert states(project)["second"] == "current"
    edit(source, "+ extra", "- extra")
    assert states(project)["second"] == "outdated"
    notebook(project / "nbs" / "second.ipynb", 'upstream = ["first"]\nproduct = None\nextra = 1', "1")  # its pair
    assert mlnb(project, "plan", "second").returncode == 0


@pytest.mark.long
def test_a_failed_task_is_resumed(project):
    source = project / "nbs" / "second.py"
    edit(source, "+ extra", "+ extra / 0")
    done = mlnb(project, "run")
    assert done.returncode == 1
    assert f"{source}, cell [4] at line 20: ZeroDivisionError" in done.stderr and "resumes after cell" in done.stderr
    edit(source, "+ extra / 0", "+ extra")
    done = mlnb(project, "run", "--resume", "last")
    assert done.returncode == 0 and "resumes after cell [3]" in done.stderr, done.stderr


@pytest.mark.long
def test_alone(project):
    (project / "scripts").mkdir()
    (project / "scripts" / "plain.py").write_text("month = 1\n\n\nprint(month)\n")
    (project / "scripts" / "report.py").write_text('# %% tags=["parameters"]\nmonth = 1\n# %%\nprint(month)\n')
    for name, last in (("plain", "1\n"), ("report", "3\n")):
        done = mlnb(project, "run", f"scripts/{name}.py", "-p", "month=3", "-o", f"{name}.ipynb")
        assert done.returncode == 0, done.stderr
        assert json.loads((project / f"{name}.ipynb").read_text())["cells"][-1]["outputs"][0]["text"] == [last]
    done = mlnb(project, "run", "nbs/second.py")
    assert "nbs/second.py is task 'second'" in done.stderr
    done = mlnb(project, "run", "scripts/report.py", "-o", "scripts/report.py")
    assert done.returncode == 1 and "write for example: -o scripts/report.ipynb" in done.stderr


def test_mistakes(project):
    source = project / "nbs" / "second.py"
    edit(source, "extra = 1", "extra = = 1")
    with pytest.raises(PipelineError, match=r"second.py: the parameters cell has a syntax error in line 13"):
        read(load_settings(project))
    source.write_text("x = 1\n")
    with pytest.raises(PipelineError, match=r'begin one cell with # %% tags=\["parameters"\]'):
        read(load_settings(project))
    source.write_text('# %% tags="parameters"\nproduct = None\n')
    with pytest.raises(NotebookError, match=r"metadata.tags: .parameters. is not of type .array."):
        cells.read(source)
    source.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 at byte 0" in mlnb(project, "check").stdout
    edit(project / "pipeline.yaml", "nbs/second.py", "nbs/second.R")
    with pytest.raises(PipelineError, match=r"a task is a notebook, or a .py file with cells"):
        read(load_settings(project))
