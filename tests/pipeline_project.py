"""A tiny project with a pipeline of quick notebooks and a small package of its own."""

import json
import os
import textwrap
from pathlib import Path

from mlnb.pipelines.plan import Planner
from mlnb.pipelines.spec import parse_parameters, read
from mlnb.project.settings import load_settings

LIBRARY = '''
FACTOR = 10


def scaled(n):
    """Ten times as much"""
    return n * FACTOR


def unused(n):
    return n
'''

PIPELINE = """
tasks:
  - name: first
    source: nbs/first.ipynb
    product: {nb: out/first.ipynb, data: out/data.txt, folder: out/folder}
    params: {n: "{{n}}"}
  - name: second
    source: nbs/second.ipynb
    product: {nb: out/second.ipynb, data: out/sum.txt}
  - name: other
    source: nbs/other.ipynb
    product: out/other.ipynb
"""

FIRST = """
from pathlib import Path
from planes.work import scaled
Path(product["folder"]).mkdir()
Path(product["folder"], "part").write_text("part")
Path(product["data"]).write_text(str(scaled(n)))
"""
SECOND = """
from pathlib import Path
Path(product["data"]).write_text(str(int(Path(upstream["first"]["data"]).read_text()) + extra))
print(product["data"])
"""


def notebook(path: Path, parameters: str | None, *cells: str) -> Path:
    "Write a notebook: a parameters cell, if any, and code cells"
    cell_sources = [] if parameters is None else [(parameters, ["parameters"])]
    cell_sources += [(c, []) for c in cells]
    empty = {"cell_type": "code", "outputs": [], "execution_count": None}
    cell_sources = [(textwrap.dedent(s).strip(), {"tags": t} if t else {}) for s, t in cell_sources]
    body = [{**empty, "id": f"c{i}", "source": s, "metadata": m} for i, (s, m) in enumerate(cell_sources)]
    metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"cells": body, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"
    )
    return path


def make(root: Path) -> Path:
    "Write the project below `root`"
    (root / "planes").mkdir(parents=True)
    (root / "planes" / "__init__.py").touch()
    (root / "planes" / "work.py").write_text(LIBRARY)
    (root / "pyproject.toml").write_text('[project]\nname = "planes"\n\n[tool.mlnb]\npackage = "planes"\n')
    (root / "pipeline.yaml").write_text(PIPELINE)
    (root / "env.yaml").write_text("n: 1\n")
    notebook(root / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = 1", FIRST)
    notebook(root / "nbs" / "second.ipynb", 'upstream = ["first"]\nproduct = None\nextra = 1', SECOND)
    notebook(root / "nbs" / "other.ipynb", "upstream = None\nproduct = None", "1 + 1")
    return root


def planner(root, *assignments):
    settings = load_settings(root)
    return Planner(settings, read(settings, parse_parameters(settings, assignments)), assignments)


def finish(plan, *names, text="1"):
    "Do what a run does: begin, write the products, commit"
    for name in names:
        start_fingerprint = plan.begin(name)
        plan.forget(name)
        for key, path in plan.spec.tasks[name].products.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if key == "folder":
                path.mkdir(exist_ok=True)
            (path / "part" if key == "folder" else path).write_text(f"{name} {key} {text}")
        plan.commit(name, start_fingerprint, "run-1", 1.5)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def aged(root):
    "As if all files of a project had been written long ago"
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (1e9, 1e9))
    return root


def done(root):
    "A project for which nothing is to do"
    plan = planner(aged(root))
    finish(plan, *plan.spec.tasks)
    plan.save()
    assert not plan.warnings
    return root
