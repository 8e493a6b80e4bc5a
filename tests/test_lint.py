"""Each thing that goes wrong silently between notebooks and library is found, and looking changes nothing."""

import json
import os
import subprocess
import sys

import pytest
import warm_cli
from click.testing import CliRunner
from pipeline_project import make, notebook

from mlnb.cli.check import check
from mlnb.notebooks.lint import run_checks
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
    export(
        root,
        "tools",
        "import math\nfrom planes.work import scaled",
        "%precision 3\ndef area(r):\n    return scaled(math.pi * r**2)",
    )
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


def findings_of(root):
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    findings = {(f.check, f.path, f.message) for f in run_checks(load_settings(root)).findings}
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == before
    return findings


def only(root, check, path):
    ((name, where, message),) = findings_of(root)
    assert (name, where) == (check, path)
    return message


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document, indent=1) + "\n")


def test_all_is_well(project):
    assert findings_of(project) == set()
    assert "from .work import scaled" in (project / "planes" / "tools.py").read_text()


def test_not_a_notebook(project):
    (project / "nbs" / "torn.ipynb").write_text('{"cells": [')
    assert "is not a notebook" in only(project, "valid", "nbs/torn.ipynb")


def test_against_the_format(project):
    change(project / "nbs" / "other.ipynb", lambda d: d["cells"][1].update(outputs=[{"output_type": "poem"}]))
    assert "is not a valid notebook: cell 2: " in {c: m for c, _, m in findings_of(project)}["valid"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["cells"][1].update(execution_count=3),
        lambda d: d["cells"][1]["metadata"].update(scrolled=True),
        lambda d: d["metadata"].update(language_info={"name": "python"}),
        lambda d: d["cells"][1].update(
            outputs=[{"output_type": "execute_result", "execution_count": 1, "data": {}, "metadata": {}}]
        ),
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
    assert {(c, p) for c, p, _ in findings_of(project)} == {
        ("stale", "planes/tools.py"),
        ("in_sync", "nbs/tools.ipynb"),
    }


@pytest.mark.parametrize("cell", ["x = 1\n#| export", "x = 1", "#| exprot\nx = 1"])
def test_a_module_that_is_still_named_is_not_to_be_deleted(project, cell):
    notebook(project / "nbs" / "tools.ipynb", None, "#| default_exp tools", cell)
    assert (
        "nbs/tools.ipynb names this module and exports no cell to it"
        in {c: m for c, _, m in findings_of(project)}["stale"]
    )


def test_a_syntax_error_in_an_exported_cell(project):
    export(project, "tools", "x = 1", "def f(:\n    pass")
    assert only(project, "syntax", "nbs/tools.ipynb").startswith("exported cell 3 has a syntax error in line 2")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import math\nmath?",
            "exported cell 2 is not Python in line 3: `math?` is for IPython; move it to a cell that is not exported",
        ),
        ("!ls", "exported cell 2 is not Python in line 2: `!ls` is for IPython"),
        ("x = 1\nfiles = !ls", "exported cell 2 is not Python in line 3: `files = !ls`"),
        ("x = %time 1", "exported cell 2 is not Python in line 2: `x = %time 1`"),
        ("await x", "exported cell 2 has a syntax error in line 2: 'await' outside function"),
        ("x = 1\nreturn x", "exported cell 2 has a syntax error in line 3: 'return' outside function"),
        ("if True:\n\tx = 1\n        y = 2", "exported cell 2 has a syntax error in line 4"),
        ("def f(a, a): pass", "exported cell 2 has a syntax error in line 2: duplicate argument"),
        ("x = '\x00'", "exported cell 2 has a syntax error"),
        ("for x in y:", "exported cell 2 has a syntax error in line 2: expected an indented block"),
    ],
)
def test_modules_that_cannot_be_imported(project, code, says):
    export(project, "fresh", code)
    assert says in {c: m for c, _, m in findings_of(project)}["syntax"]


def test_every_cell_that_cannot_be_imported_is_reported(project):
    export(project, "fresh", "x = 1", "x?", "y = 2", "!ls", "return 3")
    messages = [m.partition(" in line")[0] for c, _, m in findings_of(project) if c == "syntax"]
    assert sorted(messages) == [
        "exported cell 3 is not Python",
        "exported cell 5 is not Python",
    ]  # the next, once these are mended


@pytest.mark.parametrize(
    "code",
    [
        "%matplotlib inline\nx = 1",  # is taken out
        "x = '''\n!ls\nf?\n'''",
        "import re\nx = re.compile('\\d')",  # a warning
        "async def f(x):\n    return await x",
        "try:\n    get_ipython()\nexcept NameError:\n    pass",
        "def f():\n    return display",
        "if False:\n    display",
        "from contextlib import suppress\nwith suppress(NameError):\n    display",
        "from __future__ import annotations\ndef f(x: Later): pass",
        "x = [y for y in range(3)]\nclass A:\n    a = 1\n    b = a\n    name = __qualname__",
        "from math import *\nx = sin(1)",
        "x = globals()\nx['y'] = 1\ny",
    ],
)
def test_modules_that_can(project, code):
    export(project, "fresh", code)
    assert {c for c, _, _ in findings_of(project)} == {"in_sync"}  # it has not been exported


def test_a_line_that_only_looks_like_a_magic(project):
    sources = ["x = 5 \\\n    % 3", "y = (x\n     % 3)"]
    export(project, "fresh", *sources)
    messages = [m for c, _, m in findings_of(project) if c == "syntax"]
    assert sorted(m.partition(",")[0] for m in messages) == [
        "exported cell 2 loses `% 3`",
        "exported cell 3 loses `% 3)`",
    ]
    text = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(text.replace("nbdev.scrubmagics", "mlnb.notebooks.cells"))
    export(project, "tools", "%precision 3\nx = 1", "if x:\n    %time x\n    x = 7 \\\n      % 3")
    assert {m for c, _, m in findings_of(project) if c == "syntax"} == set()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("display(1)", "display"),
        ("get_ipython().system('ls')", "get_ipython"),
        ("def f(x: Unit): pass", "Unit"),
        ("def f(x=START): pass", "START"),
        ("@cached\ndef f(): pass", "cached"),
        ("class A(Base): pass", "Base"),
        ("class A:\n    x = START", "START"),
        ("for i in range(3):\n    print(late)", "late"),
    ],
)
def test_names_that_an_import_does_not_find(project, code, name):
    export(project, "fresh", code)
    message = {c: m for c, _, m in findings_of(project)}["names"]
    assert message.startswith(f"exported cell 2 uses '{name}' in line ") and "no exported cell defines it" in message


def exported_as(project, *sources):
    "Write and export a notebook, and say which checks find something"
    notebook(project / "nbs" / "core.ipynb", None, *sources)
    subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=project, check=True
    )
    return findings_of(project)


@pytest.mark.parametrize(
    "sources",
    [
        ("# | default_exp core", "# | export\nx = 1"),
        ("#|default_exp core", "#|export\nx = 1"),
        ("#| default_exp: core", "#| export: true\nx = 1"),
        ("#| default_exp core", "%%time\n#| export\nx = 1"),
        ("#| default_exp core", "#| exporti\nx = 1"),
        ("#| default_exp core", "#| exports\nx = 1"),
        ("#| default_exp core\n#| export\nx = 1",),
        ("%%capture\n\n#| default_exp core", "\n#| eval: false\n\n  #| export\nx = 1"),
        ("#| default_exp core", "#| export tools\ny = area(1)", "#| export\nx = 1"),
    ],
)
def test_directives_as_nbdev_reads_them(project, sources):
    (project / "nbs" / "tools.ipynb").rename(project / "nbs" / "a_tools.ipynb")  # nbdev goes by name
    assert exported_as(project, *sources) == set()
    assert "x = 1" in (project / "planes" / "core.py").read_text()


def test_directives_in_the_metadata(project):
    path = notebook(project / "nbs" / "core.ipynb", None, "1 + 1", "x = 1")
    change(
        path,
        lambda d: (
            d["metadata"].update(nbdev={"default_exp": "core"})
            or d["cells"][1]["metadata"].update(nbdev={"export": "true"})
        ),
    )
    subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=project, check=True
    )
    assert findings_of(project) == set() and "x = 1" in (project / "planes" / "core.py").read_text()
    change(path, lambda d: d["cells"][1]["metadata"].update(nbdev={"export": True}))
    assert "values must be str" in only(project, "in_sync", "nbs/core.ipynb")


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ({"source": "x = 1\n#| export"}, "`#| export` has no effect after code"),
        ({"source": "x = 1\n  # | export"}, "`# | export` has no effect after code"),
        ({"source": "# a comment\n#| export\nx = 1"}, "`#| export` has no effect after code"),
        ({"source": "import os\n#| default_exp other"}, "`#| default_exp other` has no effect after code"),
        ({"source": "x = 1\n#| eval: false"}, "`#| eval: false` has no effect after code"),
        ({"source": "%%time\nx = 1\n#|exporti"}, "`#|exporti` has no effect after code"),
        ({"source": "#| exprot\nx = 1"}, "`#| exprot` is no directive; did you mean `#| export`?"),
        ({"cell_type": "raw", "source": "#| export\nx = 1"}, "`#| export` has no effect in a raw cell"),
        (
            {"cell_type": "markdown", "source": "#| default_exp other"},
            "`#| default_exp` has no effect in a markdown cell",
        ),
    ],
)
def test_directives_without_effect(project, cell, says):
    def edit(document):
        document["cells"][2].update(cell)
        if document["cells"][2]["cell_type"] != "code":
            document["cells"][2] = {
                k: v for k, v in document["cells"][2].items() if k not in ("outputs", "execution_count")
            }

    path = notebook(project / "nbs" / "tools2.ipynb", None, "1 + 1", "2 + 2", "x = '''\n#| export\n'''\n# export")
    change(path, edit)
    assert f"cell 3: {says}" in only(project, "directives", "nbs/tools2.ipynb")


def test_a_module_that_is_named_twice(project):
    assert "cells 1 and 2" not in str(exported_as(project, "#| default_exp core", "#| export\nx = 1"))
    notebook(project / "nbs" / "core.ipynb", None, "#| default_exp core", "#| default_exp core", "#| export\nx = 1")
    assert "cells 1, 2 each have a default_exp" in only(project, "directives", "nbs/core.ipynb")


@pytest.mark.parametrize(
    "text", ['{"cells": [', "", "null", '{"nbformat": 4, "cells": [{"cell_type": "code", "source": null}]}']
)
def test_no_module_of_a_broken_notebook_is_to_be_deleted(project, text):
    (project / "nbs" / "tools.ipynb").write_text(text)
    assert {(c, p) for c, p, _ in findings_of(project)} == {("valid", "nbs/tools.ipynb")}


def test_every_broken_notebook_is_reported_and_the_others_are_checked(project, monkeypatch):
    nbs = project / "nbs"
    (nbs / "folder.ipynb").mkdir()
    (nbs / "link.ipynb").symlink_to("gone.ipynb")
    os.mkfifo(nbs / "pipe.ipynb")
    (nbs / "empty.ipynb").touch()
    (nbs / "bom.ipynb").write_bytes(b"\xef\xbb\xbf" + (nbs / "tools.ipynb").read_bytes())
    for name, edit in {
        "tags": lambda d: d["cells"][1]["metadata"].update(tags=None),
        "kernel": lambda d: d["metadata"].update(kernelspec=None),
        "meta": lambda d: d["cells"][0].update(metadata=None),
    }.items():
        change(notebook(nbs / f"{name}.ipynb", None, "1", "2"), edit)
    change(notebook(nbs / "untidy.ipynb", None, "1"), lambda d: d["cells"][0].update(execution_count=3))
    code, text = command(project, monkeypatch, "--json")
    findings = json.loads(text)["findings"]
    assert code == 1
    broken = {"folder", "link", "pipe", "empty", "bom", "tags", "kernel", "meta"}
    assert {f["path"] for f in findings if f["check"] == "valid"} == {f"nbs/{name}.ipynb" for name in broken}
    assert [f["path"] for f in findings if f["check"] == "clean"] == ["nbs/untidy.ipynb"]
    assert "cell 2: metadata.tags is null" in str(findings) and "metadata.kernelspec is null" in str(findings)


def test_tasks_and_their_parameters(project):
    notebook(project / "nbs" / "other.ipynb", None, "1 + 1")
    assert "has no parameters cell" in only(project, "parameters", "nbs/other.ipynb")
    notebook(project / "nbs" / "other.ipynb", "upstream = None", "1 + 1")
    assert not findings_of(project)  # it has no product but its executed copy


def mlnb(root, *words):
    return warm_cli.run(words, cwd=root, env=os.environ)


def test_the_command(project):
    done = mlnb(project / "nbs", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(mlnb(project, "check", "--json").stdout) == {
        "ok": True,
        "notebooks": 4,
        "not_examined": {},
        "findings": [],
    }
    (project / "env.yaml").unlink()
    done = mlnb(project, "check", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["findings"][0]["check"] == "pipeline"
    done = mlnb(project, "check")
    assert done.returncode == 1 and "env.yaml does not define" in done.stdout and "Traceback" not in done.stderr


def command(root, monkeypatch, *words):
    "The command's exit code and what it printed"
    monkeypatch.chdir(root)
    result = CliRunner().invoke(check, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_notebooks_that_are_elsewhere(project, monkeypatch):
    _, text = command(project, monkeypatch)
    assert all(line.startswith("●") for line in text.splitlines())
    (project / "nbs").rename(project / "work")
    (project / "pipeline.yaml").unlink()
    code, text = command(project, monkeypatch)
    first = "not examined: notebooks: there is no folder nbs; there are some in work: "
    first += 'write notebooks = "work" in [tool.mlnb]'
    assert code == 1 and text.splitlines()[0] == first and "○ notebooks are valid" in text


def test_notebooks_of_the_pipeline_are_checked_wherever_they_are(project, monkeypatch):
    (project / "nbs").rename(project / "work")
    text = (project / "pipeline.yaml").read_text()
    (project / "pipeline.yaml").write_text(text.replace("nbs/", "work/"))
    change(project / "work" / "other.ipynb", lambda d: d["cells"][1].update(execution_count=3))
    code, text = command(project, monkeypatch)
    first, *lines = text.splitlines()
    assert first.startswith(
        "not examined: notebooks outside of the pipeline: there is no folder nbs; there are some in work"
    )
    assert "  work/other.ipynb: cell 2 is not clean; run: nbdev-clean --fname work/other.ipynb" in lines and code == 1
    assert "● notebooks are valid" in lines and not any("planes/tools.py" in line for line in lines)


def test_a_notebook_that_nbdev_does_not_look_at(project):
    (project / "nbs" / "tools.ipynb").rename(project / "tools.ipynb")
    (project / "pipeline.yaml").write_text("tasks:\n- {source: tools.ipynb, product: out/tools.ipynb}\n")
    assert ("directives", "tools.ipynb") in {f[:2] for f in findings_of(project)} and "stale" not in {
        f[0] for f in findings_of(project)
    }


def test_nothing_at_all_is_not_green(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "planes"\nversion = "1"\n[tool.mlnb]\n')
    code, text = command(tmp_path, monkeypatch)
    first, *lines = text.splitlines()
    assert (
        code == 1
        and first == "not examined: notebooks: there is no folder nbs"
        and not any("●" in line for line in lines)
    )
    (tmp_path / "nbs").mkdir()
    code, text = command(tmp_path, monkeypatch, "--json")
    report = json.loads(text)
    assert (
        code == 1
        and not report["ok"]
        and report["notebooks"] == 0
        and report["not_examined"]["notebooks"] == "nbs holds no notebook"
    )


def test_notebooks_at_the_top_of_a_project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "planes"\nversion = "1"\n[tool.mlnb]\n')
    notebook(tmp_path / "analysis.ipynb", None, "1 + 1")
    assert 'in the project\'s folder: write notebooks = "."' in command(tmp_path, monkeypatch)[1].splitlines()[0]
    with (tmp_path / "pyproject.toml").open("a") as f:
        f.write('notebooks = "."\n')
    notebook(tmp_path / "venv" / "lib" / "example.ipynb", None, "1 + 1")
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    code, text = command(tmp_path, monkeypatch, "--json")
    report = json.loads(text)
    assert (
        code == 0
        and report["notebooks"] == 1
        and report["not_examined"].keys()
        == {
            "modules",
            "outputs and metadata",
            "tasks",
        }
    )
