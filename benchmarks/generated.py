"""Generated projects for the benchmarks: as many tasks, cells and functions as asked for, fit for mlnb and for stock
Ploomber."""

import json
from pathlib import Path

PACKAGE = "generated_tasks"


def notebook(path: Path, parameters: str, cells: list[str]) -> None:
    """Write a task notebook."""
    sources = [(parameters, {"tags": ["parameters"]}), *((cell, {}) for cell in cells)]
    cell_list = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "source": source,
            "metadata": metadata,
            "outputs": [],
            "execution_count": None,
        }
        for i, (source, metadata) in enumerate(sources)
    ]
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(
        json.dumps({"cells": cell_list, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1)
    )


def library(functions: int) -> str:
    """A module whose functions each call the one ten before, in columns of at most twenty."""
    lines = ["SCALE = 3\n"]
    for i in range(functions):
        before = f"f{i - 10:03}(x)" if i >= 10 and i // 10 % 20 else "x"
        lines.append(
            f'\ndef f{i:03}(x):\n    """Step {i}"""\n    y = {before} + {i}\n    return y * SCALE if y % 2 else y - 1\n'
        )
    return "\n".join(lines)


def make(
    root: Path,  # a folder to make the project in
    tasks: int = 50,
    chain: bool = True,  # each task needs the one before; else none needs another
    cells: int = 3,  # of each notebook
    functions: int = 200,  # of the package; task i uses the functions 4i to 4i+3, from the start again after the last
    imports: tuple[str, ...] = (),  # packages that every notebook imports first
) -> Path:
    """Write a project and return its folder. Task names are t0000, t0001, ..."""
    (root / PACKAGE).mkdir(parents=True)
    (root / "nbs").mkdir()
    (root / PACKAGE / "__init__.py").touch()
    (root / PACKAGE / "work.py").write_text(library(functions))
    (root / "pyproject.toml").write_text(f'[project]\nname = "generated"\n\n[tool.mlnb]\npackage = "{PACKAGE}"\n')
    (root / "env.yaml").write_text("seed: 1\n")
    lines = ["tasks:"]
    for i in range(tasks):
        name, before = f"t{i:04}", f"t{i - 1:04}" if chain and i else None
        used = [f"f{(4 * i + k) % functions:03}" for k in range(4)]
        start = (
            "".join(f"import {m}\n" for m in imports)
            + f"from pathlib import Path\nfrom {PACKAGE}.work import {', '.join(used)}"
        )
        middle = [f"value_{k} = {used[k % 4]}(seed + {k})  # step {k}" for k in range(cells - 2)]
        if before:
            start += f'\nbefore = Path(upstream["{before}"]["data"]).read_text()'
        end = f'Path(product["data"]).write_text(str({" + ".join(f"value_{k}" for k in range(cells - 2)) or "1"}))'
        parameters = f"upstream = {[before] if before else None}\nproduct = None\nseed = 0"
        notebook(root / "nbs" / f"{name}.ipynb", parameters, [start, *middle, end])
        lines += [
            f"  - source: nbs/{name}.ipynb", f"    name: {name}",
            f"    product: {{nb: out/{name}.ipynb, data: out/{name}.txt}}",
            '    params: {seed: "{{seed}}"}',
        ]  # fmt: skip
    (root / "pipeline.yaml").write_text("\n".join(lines) + "\n")
    return root


def complete(root: Path) -> None:
    """Make it as if every task had run: products written and recorded, without a kernel."""
    from mlnb.pipelines.plan import Planner
    from mlnb.pipelines.spec import read
    from mlnb.project.settings import load_settings

    settings = load_settings(root)
    planner = Planner(settings, read(settings))
    (root / "out").mkdir(exist_ok=True)
    for name, task in planner.spec.tasks.items():
        token = planner.begin(name)
        for key, path in task.products.items():
            path.write_text(f"{key} of {name}")
        planner.commit(name, token, "generated", 0.1)
    planner.save()
