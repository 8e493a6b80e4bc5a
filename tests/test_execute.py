"""Notebooks in real kernels: failures, time-outs, dead kernels, interrupts, event loops."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from mlnb.notebooks import cells
from mlnb.notebooks.execute import execute
from mlnb.project.errors import NotebookError


@pytest.fixture
def notebook(tmp_path):
    "A function that writes a notebook of code cells; the first of several is tagged as the parameters"

    def write(*sources, name="task.ipynb", **metadata):
        made = [
            {
                "cell_type": "code",
                "id": f"c{i}",
                "source": s,
                "metadata": {"tags": ["parameters"]} if not i else {},
                "outputs": [],
            }
            for i, s in enumerate(sources)
        ]
        path = tmp_path / name
        made = [{**c, "execution_count": None} for c in made]
        path.write_text(json.dumps({"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
        return path

    return write


def texts(path):
    "What the cells of an executed notebook printed"
    return "".join("".join(o.get("text", "")) for c in cells.read(path)["cells"] for o in c.get("outputs", []))


def test_parameters_working_folder_and_progress(notebook, tmp_path):
    seen, given = [], {"x": [1, None, "é"]}
    path = notebook("x = None", "import os; print(x, os.getcwd())", "", "# last")
    (tmp_path / "work").mkdir()
    out = execute(
        path, tmp_path / "a" / "b" / "out.ipynb", given, cwd=tmp_path / "work", on_cell=lambda *k: seen.append(k)
    )
    assert texts(out) == f"[1, None, 'é'] {tmp_path / 'work'}\n"
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert os.getcwd() != str(tmp_path / "work")
    assert [p.name for p in out.parent.iterdir()] == ["out.ipynb"]
    assert cells.read(out)["metadata"]["papermill"]["input_path"] == str(path)


def test_undeclared_parameter_is_refused_before_anything_starts(notebook, tmp_path):
    with pytest.raises(NotebookError, match=r"no parameter 'seeed' \(did you mean 'seed'\?\)"):
        execute(notebook("seed = 1"), tmp_path / "out.ipynb", {"seeed": 1})
    assert not (tmp_path / "out.ipynb").exists()


def test_a_raising_cell(notebook, tmp_path):
    out = tmp_path / "out.ipynb"
    with pytest.raises(
        NotebookError, match=rf"task.ipynb, cell \[3\]: ValueError: no such month; the executed copy is {out}"
    ):
        execute(notebook("x = 1", "raise ValueError('no such month')", "print('never')"), out, {"x": 2})
    assert "In [3]" in out.read_text() and "never\\n" not in out.read_text()


def test_a_failing_shell_line_and_a_failing_magic(notebook, tmp_path):
    out = tmp_path / "out.ipynb"
    with pytest.raises(
        NotebookError, match=r"cell \[1\]: CalledProcessError: Command 'exit 3' returned non-zero exit status 3"
    ):
        execute(notebook("!true\n!exit 3", "print('never')"), out)
    assert "never\\n" not in out.read_text()
    script = tmp_path / "raises.py"
    script.write_text("1 / 0")
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        execute(notebook(f"!true\nx = 1 != 2\n%run {script}"), out)


@pytest.mark.long
def test_time_out_and_dead_kernel(notebook, tmp_path):
    out = tmp_path / "out.ipynb"
    with pytest.raises(NotebookError, match=r"cell \[2\]: took longer than 10 seconds; the executed copy"):
        execute(notebook("print('before', flush=True)", "import time; time.sleep(600)"), out, timeout=10)
    assert "before" in texts(out)
    with pytest.raises(NotebookError, match=r"cell \[1\]: its kernel died: ended by SIGKILL; the executed copy"):
        execute(notebook("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), out)


def test_kernels(notebook, tmp_path):
    foreign = {"kernelspec": {"name": "somebody-elses", "language": "python", "display_name": "x"}}
    out = execute(notebook("import sys; print(sys.executable)", **foreign), tmp_path / "out.ipynb")
    assert os.path.samefile(texts(out).strip(), sys.executable)
    with pytest.raises(NotebookError, match="could not be started: NoSuchKernel"):
        execute(notebook("x = 1"), tmp_path / "out.ipynb", kernel="absent")


def test_inside_a_running_loop(notebook, tmp_path):
    async def main():
        return execute(notebook("print('in a loop')"), tmp_path / "out.ipynb")

    assert texts(asyncio.run(main())) == "in a loop\n"


def test_an_interrupt_ends_the_kernel(notebook, tmp_path):
    path = notebook(
        "import os; print(os.getpid()); open('pid', 'w').write(str(os.getpid()))", "import time\ntime.sleep(60)"
    )
    program = textwrap.dedent(f"""
        from mlnb.notebooks.execute import execute
        execute({str(path)!r}, 'out.ipynb', on_cell=lambda k, n: print(k, flush=True))
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "1\n" and process.stdout.readline() == "2\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert (tmp_path / "out.ipynb").exists()
