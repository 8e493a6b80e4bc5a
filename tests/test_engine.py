"""The engine against real kernels: what is lost elsewhere, what never ends, what is too much."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from pipeline_project import notebook
from waiting import is_alive, until

from mlnb.notebooks import cells, engine, kernels
from mlnb.notebooks.execute import execute
from mlnb.project.errors import NotebookError


@pytest.fixture
def task(tmp_path):
    "A function that executes a notebook of the given cells and returns the executed copy, read"

    def run(*sources, **options):
        path = notebook(tmp_path / "task.ipynb", None, *sources)
        return cells.read(execute(path, tmp_path / "out.ipynb", log=tmp_path / "out.log", **options))

    return run


def outputs(copy, cell=-1):
    return copy["cells"][cell]["outputs"]


def text(copy, name="stdout", cell=-1):
    return "".join(
        "".join(o["text"]) for o in outputs(copy, cell) if o["output_type"] == "stream" and o["name"] == name
    )


def test_rich_outputs_are_whole(task):
    copy = task(
        "from IPython.display import HTML, Markdown, display, clear_output\nh = display(HTML('<b>1</b>'), "
        "display_id=True)",
        "print('gone'); clear_output(); print('kept')\nh.update(HTML('<b>2</b>'))",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "import pandas as pd\npd.DataFrame({'a': range(1_000_000)})",
    )
    assert "".join(outputs(copy, 0)[0]["data"]["text/html"]) == "<b>2</b>"
    assert text(copy, cell=1) == "kept\n"
    assert "image/png" in outputs(copy, 2)[-1]["data"]
    table = "".join(outputs(copy)[0]["data"]["text/html"])
    assert "1000000 rows" in table and len(table) < 100_000


@pytest.fixture
def warm():
    "The fork server has imported everything: the next kernel is forked"
    kernels.fork_worker("builtins:repr").wait()
    until(lambda: not any(server.get("waiting", True) for server in kernels.status()), "a loaded server")


@pytest.mark.parametrize("how", ["warm", "cold"])
def test_thousands_of_displays_arrive(task, how, request, monkeypatch):
    if how == "warm" and sys.platform == "linux":
        request.getfixturevalue("warm")
    monkeypatch.setenv("MLNB_WARM_KERNELS", str(how == "warm").lower())
    copy = task("for i in range(5_000):\n    display(i)")
    assert [o["data"]["text/plain"] for o in outputs(copy)] == [[str(i)] for i in range(5_000)]


def test_a_debugger_steps_into_what_is_not_the_kernels(task, warm):
    copy = task(
        "import os; files = get_ipython().kernel._kernel_modules",
        "print(*('ipykernel' in ''.join(files), f'{os.sep}pandas{os.sep}' in ''.join(files)))",
    )
    assert text(copy) == "True False\n"


def test_a_hundred_megabytes(task, tmp_path, monkeypatch):
    monkeypatch.setenv("MLNB_OUTPUT_LIMIT_MB", "200")
    copy = task("line = 'x' * 999_999\nfor _ in range(100):\n    print(line)")
    assert len(text(copy)) == 1_000_000
    assert f"99,000,000 more characters of stdout are in {tmp_path / 'out.log'}" in text(copy, "stderr")
    assert (tmp_path / "out.log").stat().st_size >= 99_000_000 and (tmp_path / "out.ipynb").stat().st_size < 2_000_000


def test_one_output_that_is_too_large(task):
    copy = task("from IPython.display import HTML\nHTML('x' * 30_000_000)")
    assert "[30,000,000 characters of text/html are left out of this copy]" in "".join(
        outputs(copy)[0]["data"]["text/html"]
    )


def test_a_progress_bar_keeps_its_last_state(task):
    copy = task("import sys\nfor i in range(200):\n    print(f'\\r{i} of 200', end='', flush=True)")
    assert text(copy) == "199 of 200"


@pytest.mark.parametrize(
    "end", ["import sys; sys.exit()", "raise SystemExit(None)", "import sys; sys.exit(False)", "exit()", "quit"]
)
def test_leaving_early_is_no_failure(task, end):
    copy = task("print('before')", end, "print('never')")
    assert text(copy, cell=0) == "before\n" and not outputs(copy, 2)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("import sys; sys.exit(3)", r"cell \[1\]: SystemExit: 3"),
        ("import os; os._exit(3)", r"cell \[1\]: its kernel died: ended with exit code 3"),
        ("%no_such_magic", r"cell \[1\]: UsageError: Line magic function `%no_such_magic` not found"),
        ("%%no_such_magic\n1", r"cell \[1\]: UsageError"),
        ("!no-such-program-at-all", r"cell \[1\]: CalledProcessError: .* returned non-zero exit status 127"),
        ("%%bash\nexit 4", r"cell \[1\]: CalledProcessError"),
        ("x = (", r"cell \[1\]: _IncompleteInputError|SyntaxError"),
        ("await __import__('asyncio').sleep(0); raise KeyError('late')", r"KeyError: 'late'"),
    ],
)
def test_failures_fail(task, cell, says):
    with pytest.raises(NotebookError, match=says):
        task(cell, "print('never')")


def test_a_cell_that_may_raise(task, tmp_path):
    path = notebook(tmp_path / "may.ipynb", None, "1 / 0", "print('after')")
    document = json.loads(path.read_text())
    document["cells"][0]["metadata"]["tags"] = ["raises-exception"]
    path.write_text(json.dumps(document))
    assert text(cells.read(execute(path, tmp_path / "out.ipynb"))) == "after\n"


@pytest.mark.long
def test_time_is_limited_for_the_notebook_too(task, tmp_path):
    with pytest.raises(NotebookError, match=r"cell \[2\]: the notebook took longer than 10 seconds"):
        task("1", "import time\nfor _ in range(600):\n    time.sleep(0.1)", notebook_timeout=10)
    shown = (tmp_path / "out.ipynb").read_text()
    assert "KeyboardInterrupt" in shown, "the traceback shows where the cell was"


def test_a_cell_that_ignores_the_interrupt_ends_all_the_same(task):
    stubborn = "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except KeyboardInterrupt:\n        pass"
    with pytest.raises(NotebookError, match="took longer than 1 seconds"):
        task(stubborn, timeout=1)


def test_threads_and_processes_end_with_the_notebook(task, tmp_path):
    copy = task(
        "import subprocess, sys, threading, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "print(child.pid)"
    )
    child = int(text(copy))
    until(lambda: not is_alive(child), "the end of the child")


def test_what_was_written_stays_though_processes_and_threads_are_left(task, tmp_path):
    task(
        "import subprocess, threading, time\nsleeper = subprocess.Popen(['sleep', '600'])\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\nfile = open('left.txt', 'w')\n"
        "file.write('unflushed');",
        cwd=tmp_path,
    )
    assert (tmp_path / "left.txt").read_text() == "unflushed"


def test_a_kernel_that_had_to_be_killed_is_a_failure(task, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SHUTDOWN_GRACE", 1)
    with pytest.raises(
        NotebookError, match=r"task.ipynb: its kernel did not end within 1 s; what it had not written is lost; "
    ):
        task("import atexit, time\natexit.register(time.sleep, 600);")
    with pytest.raises(NotebookError, match="its kernel did not end"):
        task("import atexit, time\natexit.register(time.sleep, 600);", "raise SystemExit")
    with pytest.raises(NotebookError, match=r"cell \[2\]: ZeroDivisionError"):
        task("import atexit, time\natexit.register(time.sleep, 600);", "1 / 0")


def test_what_a_thread_prints_belongs_to_its_cell(task):
    copy = task(
        "import threading, time\nt = threading.Timer(0.3, print, ['late'])\nt.start()", "t.join(); time.sleep(0.3)"
    )
    assert text(copy, cell=0) + text(copy, cell=1) == "late\n"


def test_atexit_is_done(task, tmp_path):
    task(f"import atexit, pathlib\natexit.register(pathlib.Path({str(tmp_path / 'done')!r}).write_text, 'x')")
    assert (tmp_path / "done").read_text() == "x"


def test_the_copy_can_be_read_while_it_is_made(tmp_path):
    path = notebook(
        tmp_path / "task.ipynb",
        None,
        "print('first', flush=True)",
        "import time\nprint('second', flush=True)\ntime.sleep(5)",
    )
    out, error = tmp_path / "out.ipynb", []

    def work():
        try:
            execute(path, out)
        except NotebookError as e:
            error.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    seen = False
    while thread.is_alive() and not seen:
        if out.exists():
            copy = json.loads(out.read_text())  # whole at any moment
            seen = "second" in json.dumps(copy["cells"][1]["outputs"])
        time.sleep(0.01)
    assert seen and not error
    execution = copy["cells"][1]["metadata"]["papermill"]
    assert execution["status"] == "running"
    thread.join()


def test_what_the_process_says_is_kept(task, tmp_path):
    task("import os\nos.write(2, b'from the depths\\n');", env={"MLNB_EXAMPLE": "1"})
    output = "".join(p.read_text() for p in (tmp_path / "out.ipynb", tmp_path / "out.log") if p.exists())
    assert "from the depths" in output


def test_variables_of_the_kernel(task):
    assert text(task("import os\nprint(os.environ['MLNB_EXAMPLE'])", env={"MLNB_EXAMPLE": "seen"})) == "seen\n"


def test_papermill_uses_it_by_name(tmp_path):
    path = notebook(tmp_path / "task.ipynb", "x = 1", "print('x is', x)")
    program = [
        sys.executable,
        "-m",
        "papermill",
        "--engine",
        "mlnb",
        "-k",
        "python3",
        "-p",
        "x",
        "5",
        path,
        tmp_path / "out.ipynb",
    ]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr
    assert text(cells.read(tmp_path / "out.ipynb")) == "x is 5\n"


def test_an_unwritable_folder(tmp_path):
    path = notebook(tmp_path / "task.ipynb", None, "1")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotebookError, match=r"Not a directory|File exists"):
        execute(path, tmp_path / "file" / "out.ipynb")
