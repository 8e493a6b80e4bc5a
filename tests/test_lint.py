"""Each thing that goes wrong silently between notebooks and library is found, and looking changes nothing."""

import json
import subprocess
import sys

import pytest
from pipeline_project import make, notebook

from mlnb.notebooks.lint import run
from mlnb.project.settings import load_settings

NBDEV = """
[tool.nbdev]
lib_path = "planes"
nbs_path = "nbs"
allowed_cell_metadata_keys = ["tags"]
export_procs = ["nbdev.scrubmagics:scrub_magics"]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A clean project with an exported notebook; copy it, do not change it"
    root = make(tmp_path_factory.mktemp("lint") / "project")
    with (root / "pyproject.toml").open("a") as f:
        f.write(NBDEV)
    export(root, "tools", "import math\nfrom planes.work import scaled", "%precision 3\ndef area(r):\n    return scaled(math.pi * r**2)")
    program = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
    return root


@pytest.fixture
def project(exported, tmp_path):
    subprocess.run(["cp", "-a", exported, tmp_path / "project"], check=True)
    return tmp_path / "project"


def export(root, module, *sources, name=None):
    cells = [f"#| export\n{s}" for s in sources]
    return notebook(root / "nbs" / f"{name or module}.ipynb", None, f"#| default_exp {module}", *cells)


def found(root):
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    findings = {(f.check, f.path, f.message) for f in run(load_settings(root))}
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == before
    return findings


def only(root, check, path):
    ((name, where, message),) = found(root)
    assert (name, where) == (check, path)
    return message


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document, indent=1) + "\n")


def test_all_is_well(project):
    assert found(project) == set()
    assert "from .work import scaled" in (project / "planes" / "tools.py").read_text()


def test_not_a_notebook(project):
    (project / "nbs" / "torn.ipynb").write_text('{"cells": [')
    assert "is not a notebook" in only(project, "valid", "nbs/torn.ipynb")


def test_against_the_format(project):
    change(project / "nbs" / "other.ipynb", lambda d: d["cells"][1].update(outputs=[{"output_type": "poem"}]))
    assert "is not a valid notebook" in {c: m for c, _, m in found(project)}["valid"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["cells"][1].update(execution_count=3),
        lambda d: d["cells"][1]["metadata"].update(scrolled=True),
        lambda d: d["metadata"].update(language_info={"name": "python"}),
        lambda d: d["cells"][1].update(outputs=[{"output_type": "execute_result", "execution_count": 1, "data": {}, "metadata": {}}]),
    ],
)
def test_what_is_not_clean(project, edit):
    change(project / "nbs" / "other.ipynb", edit)
    assert "not clean; run: nbdev-clean" in only(project, "clean", "nbs/other.ipynb")


def test_an_error_that_was_saved(project):
    output = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    change(project / "nbs" / "other.ipynb", lambda d: d["cells"][1].update(outputs=[output]))
    assert only(project, "clean", "nbs/other.ipynb").startswith("cell 2 shows an error")


def test_the_module_was_edited(project):
    with (project / "planes" / "tools.py").open("a") as f:
        f.write("x = 1\n")
    assert "differs from what nbs/tools.ipynb exports" in only(project, "in_sync", "planes/tools.py")


def test_the_notebook_was_edited(project):
    export(project, "tools", "x = 1")
    assert "run: nbdev-export" in only(project, "in_sync", "planes/tools.py")


def test_a_notebook_that_was_never_exported(project):
    export(project, "deep.fresh", "x = 1", name="fresh")
    assert "planes/deep/fresh.py has not been exported" in only(project, "in_sync", "nbs/fresh.ipynb")


def test_two_notebooks_for_one_module(project):
    export(project, "tools", "x = 1", name="zools")
    assert "nbs/tools.ipynb, nbs/zools.ipynb" in only(project, "one_notebook", "nbs/zools.ipynb")


def test_no_module_named(project):
    notebook(project / "nbs" / "lost.ipynb", None, "#| export\nx = 1")
    assert "exports cells without naming a module" in only(project, "one_notebook", "nbs/lost.ipynb")


def test_a_renamed_module_leaves_the_old_one(project):
    export(project, "tool", "x = 1", name="tools")
    assert {(c, p) for c, p, _ in found(project)} == {("stale", "planes/tools.py"), ("in_sync", "nbs/tools.ipynb")}


def test_a_syntax_error_in_an_exported_cell(project):
    export(project, "tools", "x = 1", "def f(:\n    pass")
    assert only(project, "syntax", "nbs/tools.ipynb").startswith("exported cell 3 has a syntax error in line 2")


def test_tasks_and_their_parameters(project):
    notebook(project / "nbs" / "other.ipynb", None, "1 + 1")
    assert "has no parameters cell" in only(project, "parameters", "nbs/other.ipynb")
    notebook(project / "nbs" / "other.ipynb", "upstream = None", "1 + 1")
    assert "does not declare product" in only(project, "parameters", "nbs/other.ipynb")


def mlnb(root, *words):
    program = [sys.executable, "-c", "from mlnb.cli.main import main; main()", *words]
    return subprocess.run(program, cwd=root, capture_output=True, text=True)


def test_the_command(project):
    done = mlnb(project / "nbs", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(mlnb(project, "check", "--json").stdout) == {"ok": True, "findings": []}
    (project / "env.yaml").unlink()
    done = mlnb(project, "check", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["findings"][0]["check"] == "pipeline"
    done = mlnb(project, "check")
    assert done.returncode == 1 and "env.yaml does not define" in done.stdout and "Traceback" not in done.stderr
