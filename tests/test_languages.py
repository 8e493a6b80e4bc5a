"""A notebook runs in the kernel of its own language, or not at all."""

import json

import pytest
from echo_kernel import install
from pipeline_project import make, planner

from mlnb.notebooks import cells
from mlnb.notebooks.execute import execute
from mlnb.notebooks.fingerprint import Library
from mlnb.notebooks.languages import kernel_of
from mlnb.project.errors import NotebookError

R = {"kernelspec": {"name": "ir", "display_name": "R"}, "language_info": {"name": "R"}}


def write(path, metadata, *sources):
    made = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "source": s,
            "metadata": {"tags": [] if i else ["parameters"]},
            "outputs": [],
        }
        for i, s in enumerate(sources)
    ]
    made = [{**c, "execution_count": None} for c in made]
    path.write_text(json.dumps({"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def installed(tmp_path, monkeypatch):
    install(tmp_path / "jupyter")
    install(tmp_path / "jupyter", "bash", "bash")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


PYTHON = [
    {},
    {"kernelspec": None, "language_info": None},
    {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    {"kernelspec": {"name": "conda-env-ml-py", "language": "Python", "display_name": "ml"}},
    {
        "kernelspec": {"name": "somebody-elses", "language": None},
        "language_info": {"name": "python", "version": "3.11"},
    },
    {"kernelspec": {"language": "python"}, "language_info": {"name": "ipython"}},
    {"kernelspec": {"name": None}, "language_info": {"name": "Python3"}},
]


@pytest.mark.parametrize("metadata", PYTHON)
def test_python_runs_in_this_interpreter_whatever_its_kernel_was_called(metadata):
    assert kernel_of(metadata) == ("mlnb", "python")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (R, r"t\.ipynb needs the kernel 'ir' \(R\), which is not installed; install it"),
        (
            {"kernelspec": {"name": "julia-1.10", "language": "julia"}},
            r"needs the kernel 'julia-1.10' \(julia\), which is not installed",
        ),
        (
            {"kernelspec": {"name": "xcpp17", "language": None, "display_name": None}},
            "kernel 'xcpp17', which is not installed, and",
        ),
        ({"language_info": {"name": "bash"}}, "written in bash and names no kernel; no kernel for it is installed"),
        (
            {"kernelspec": {"name": "python3", "language": "python"}, "language_info": {"name": "R"}},
            "is python in metadata.kernelspec and R in",
        ),
        (
            {"kernelspec": {"name": "ir", "language": "R"}, "language_info": {"name": "python"}},
            "is R in metadata.kernelspec and python in",
        ),
        (
            {"kernelspec": {"name": "python3", "language": "R"}},
            "written in R, but its kernel 'python3' runs Python here",
        ),
    ],
)
def test_another_language_is_never_read_as_python(metadata, says):
    with pytest.raises(NotebookError, match=says):
        kernel_of(metadata, "t.ipynb")


def test_its_own_kernel_where_it_is_installed(installed):
    assert kernel_of(R) == ("ir", "R")
    assert kernel_of({"kernelspec": {"name": "ir"}}) == ("ir", "R")
    assert kernel_of({"language_info": {"name": "Bash"}}) == ("bash", "Bash")
    assert kernel_of({"kernelspec": {"name": "bash", "language": "bash"}, "language_info": {}}) == ("bash", "bash")


def test_it_runs_there_with_parameters_as_papermill_writes_them(installed, tmp_path):
    path = write(tmp_path / "report.ipynb", {**R, "kernelspec": {"name": "ir", "language": "r"}}, "x <- 1", "print(x)")
    copy = cells.read(execute(path, tmp_path / "out.ipynb", {"x": "a"}, checkpoints={"folder": str(tmp_path / "c")}))
    shown = ["".join(c["outputs"][0]["text"]) for c in copy["cells"]]
    assert shown == ["x <- 1", '# Parameters\nx = "a"\n', "print(x)"]
    with pytest.raises(NotebookError, match="declares no parameter 'y'"):
        execute(path, tmp_path / "out.ipynb", {"y": 1})


def test_a_failure_there_is_a_failure(installed, tmp_path):
    with pytest.raises(NotebookError, match=r"cell \[2\]: Error: the cell says FAIL"):
        execute(write(tmp_path / "report.ipynb", R, "1", "FAIL", "never"), tmp_path / "out.ipynb")


def test_parameters_that_papermill_cannot_write(tmp_path, monkeypatch):
    install(tmp_path / "jupyter", "forth", "forth")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = write(tmp_path / "task.ipynb", {"kernelspec": {"name": "forth", "language": "forth"}}, "1 constant x")
    with pytest.raises(NotebookError, match="papermill cannot write parameters in forth; it can in python, R"):
        execute(path, tmp_path / "out.ipynb", {"x": 2})


def test_the_kernel_is_named_before_anything_starts(tmp_path):
    with pytest.raises(NotebookError, match=r"report\.ipynb needs the kernel 'ir' \(R\)"):
        execute(write(tmp_path / "report.ipynb", R, "print(1)"), tmp_path / "out.ipynb")
    assert not (tmp_path / "out.ipynb").exists()


def test_a_task_in_another_language_counts_by_its_text(installed, tmp_path):
    root = make(tmp_path / "p")
    cells_of = ('upstream <- c("first")\nproduct <- NULL\nextra <- 1', "x <- 1", "%in%", "!x", "import planes.work")
    write(root / "nbs" / "second.ipynb", R, *cells_of)
    plan = planner(root)
    task, made_from = plan.spec.tasks["second"], plan.begin("second").made_from
    dependencies = Library(["planes"], root).notebook(root / "nbs" / "second.ipynb")
    assert task.upstream == ("first",) and list(task.declared) == ["upstream", "product", "extra"]
    assert not dependencies.code and dependencies.unresolved == ("what the notebook loads, which is written in R",)
    write(root / "nbs" / "second.ipynb", R, *cells_of[:1], "x <- 2", *cells_of[2:])
    assert planner(root).begin("second").made_from["notebook"] != made_from["notebook"]


@pytest.mark.parametrize(
    ("cell", "upstream"),
    [
        ("upstream = list('a', 'b')\nproduct = NULL", ["a", "b"]),
        ('upstream = ["a"]  # Julia\nproduct = nothing', ["a"]),
        ('val upstream = Seq("a");\nval product = null', ["a"]),
        ("upstream <- NULL", None),
        ("upstream = c()", None),
    ],
)
def test_upstream_tasks_in_other_languages(tmp_path, cell, upstream):
    declared = cells.parameters(write(tmp_path / "t.ipynb", R, cell))
    assert declared["upstream"].default == upstream and declared["upstream"].literal


def test_upstream_tasks_that_only_a_run_could_tell(tmp_path):
    assert not cells.parameters(write(tmp_path / "t.ipynb", R, "upstream <- all_tasks('a')"))["upstream"].literal
    assert not cells.parameters(write(tmp_path / "t.ipynb", R, "upstream <- c(\n  'a')"))["upstream"].literal
