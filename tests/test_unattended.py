"""Cells that nobody watches: commands that fail, questions, what a cell does to its kernel, output without end."""

import json
import os
import subprocess
import sys
import time

import pytest

from mlnb.notebooks import cells, engine, liveness
from mlnb.notebooks.execute import execute
from mlnb.project.errors import NotebookError


def write(path, sources, tags=()):
    made = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "source": s,
            "metadata": {"tags": list(tags)},
            "outputs": [],
            "execution_count": None,
        }
        for i, s in enumerate(sources)
    ]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def run(tmp_path):
    "A function that executes a notebook of the given cells, all with the same tags; the executed copy, read"

    def run(*sources, tags=(), **options):
        path = write(tmp_path / "task.ipynb", sources, tags)
        options.setdefault("cwd", tmp_path)
        return cells.read(execute(path, tmp_path / "out.ipynb", log=tmp_path / "out.log", **options))

    return run


def text(copy, name="stdout"):
    shown = [
        o for c in copy["cells"] for o in c.get("outputs", []) if o["output_type"] == "stream" and o["name"] == name
    ]
    return "".join("".join(o["text"]) for o in shown)


# Every way in which a cell calls a shell, runs a magic or ends. One kernel runs them all: each must raise, and the last
# line shows it.

FAILING = [
    *("!false", "!exit 3", "!kill -9 $$", "!no-such-program-at-all", "!false\n!true", "x = !false", "!!false"),
    *(
        "for i in range(2):\n    !false",
        "def f():\n    !false\nf()",
        "%sx false",
        "%system false",
        "%%sx\nfalse",
        "%time !false",
    ),
    *("get_ipython().system('false')",),
    *(
        "get_ipython().getoutput('false')",
        "get_ipython().system_raw('false')",
        "%%bash\nfalse",
        "%%sh\nexit 3",
        "%%script bash\nexit 3",
    ),
    *("%%python\nraise SystemExit(3)", "%%capture\n!false", "%%writefile no/such/x.txt\nhello", "%cd /no/such/folder"),
    *("%pushd /no/such/folder",),
    *(
        "%run no-such-script.py",
        "%load_ext no_such_extension",
        "%env NO_SUCH_VARIABLE",
        "%logstart /no/such/folder/log",
        "%no_such_magic",
    ),
    *("exit(3)", "quit(3)", "import sys; sys.exit(3)", "raise SystemExit('text')"),
    *("open('s.py', 'w').write('raise SystemExit(3)');\n%run s.py",),
    *(
        "%alias fails false\n%fails",
        "%%time\n!false",
        "%%timeit -n1 -r1\n!false",
        "import module_that_calls; module_that_calls.call()",
    ),
]


def test_every_way_to_fail_fails(run, tmp_path):
    (tmp_path / "module_that_calls.py").write_text(
        "from IPython import get_ipython\ndef call():\n    get_ipython().system('false')\n"
    )
    copy = run(*FAILING, tags=["raises-exception"])
    passed = [c["source"] for c in copy["cells"] if not any(o["output_type"] == "error" for o in c["outputs"])]
    assert ["".join(source) for source in passed] == []


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (
            "%pip install --no-index no-such-package-xyz",
            "CalledProcessError: Command '.* pip install .*' returned non-zero exit status 1",
        ),
        ("%%time\n!false", "CalledProcessError: Command 'false' returned non-zero exit status 1"),
        ("!kill -9 $$", "CalledProcessError: Command 'kill -9 .*' died with <Signals.SIGKILL: 9>"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_the_failure_names_command_and_status(run, cell, says):
    with pytest.raises(NotebookError, match=rf"cell \[1\]: {says}"):
        run(cell, "print('never')")


@pytest.mark.parametrize("how", ["cold", "another kernel"])
def test_it_holds_in_every_kernel(run, how, monkeypatch):
    if how == "cold":
        monkeypatch.setenv("MLNB_WARM_KERNELS", "false")
    with pytest.raises(NotebookError, match=r"cell \[1\]: CalledProcessError"):
        run("x = !false", kernel="python3" if how == "another kernel" else None)


def test_failures_that_are_allowed(run, monkeypatch):
    allowed = ["!false\nprint(_exit_code)", "x = !echo out; exit 4\nprint(x, _exit_code)"]
    allowed += ["%%bash\nexit 5", "%time !exit 6", "%%script bash\nfalse"]
    assert text(run(*allowed, tags=["allow-failed-commands"])).startswith("1\n['out'] 4\n")
    monkeypatch.setenv("MLNB_CAPTURED_COMMANDS_MAY_FAIL", "true")
    assert text(run("x = !echo out; exit 4\nprint(x, _exit_code)")) == "['out'] 4\n"
    with pytest.raises(NotebookError, match="CalledProcessError"):
        run("x = !exit 4", "!false")


def test_commands_show_what_they_print(run):
    shown = ["name = 'é'\n!echo {name}; echo $name >&2", "%%capture c\n!echo captured", "print(c.stdout, end='')"]
    copy = run(*shown, "!sleep 60 & echo left")
    assert text(copy) == "é\né\ncaptured\nleft\n"


def test_other_kernels_are_left_alone(tmp_path):
    "What JupyterLab starts is IPython's own"
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="mlnb", cwd=str(tmp_path))
    try:
        client.execute_interactive("!false\nx = !false", timeout=60)
        reply = client.execute("", user_expressions={"code": "_exit_code"})
        while (answer := client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != reply:
            pass
        assert answer["content"]["user_expressions"]["code"]["data"]["text/plain"] == "1"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# Nothing waits for a person.

WAITING = [
    *("!cat", "!read answer", "!read answer < /dev/tty", "x = !cat", "%%bash\nread answer; cat"),
    *("import subprocess; subprocess.run('cat')",),
    *(
        "input()",
        "import getpass; getpass.getpass()",
        "import pdb; pdb.set_trace()",
        "breakpoint()",
        "%debug",
        "%pdb on\n1 / 0",
    ),
    *("!python -i",),
    *("import sys; sys.stdin.readline()", "!less /etc/passwd < /dev/null", "!tty && false", "%man true", "help(len)"),
]


def test_nothing_waits_for_a_person(run):
    run(*WAITING, tags=["raises-exception"], notebook_timeout=120)


def test_a_question_of_pip_is_an_error(run):
    with pytest.raises(
        NotebookError, match=r"cell \[1\]: CalledProcessError: Command '.*pip uninstall packaging' returned non-zero"
    ):
        run(f"!{sys.executable} -m pip uninstall packaging", timeout=120)


# A cell does what it likes to its process: what follows runs, and the kernel ends.

DOES = [
    *(
        "import warnings; warnings.simplefilter('error')",
        "import sys; sys.stdout = None",
        "import sys; sys.stderr = None",
    ),
    *(
        "import sys; sys.stdin.close()",
        "import os; os.close(0); os.close(1); os.close(2)",
        "import builtins; builtins.print = None",
    ),
    *(
        "import os; os.mkdir('x'); os.chdir('x'); os.rmdir('../x')",
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
    ),
    *(
        "import os; os.environ.clear()",
        "import sys; sys.exit = None",
        "import asyncio; asyncio.get_event_loop().stop()",
    ),
    *("import logging; logging.disable(99)", "import sys; sys.modules.clear()", "import gc; gc.disable()"),
    *(
        "import time; time.sleep = time.time = time.monotonic = None",
        "import sys; sys.setrecursionlimit(60)",
        "%reset -f",
    ),
    *(
        "import os; os.listdir = os.replace = None",
        "import socket; socket.setdefaulttimeout(0.001)",
        "import sys; sys.stdout = object()",
    ),
]


@pytest.mark.parametrize("cell", DOES)
def test_a_cell_cannot_break_the_kernel(run, cell):
    started_at = time.monotonic()
    copy = run(cell, "x = 2\nx + 3", timeout=60)
    assert copy["cells"][1]["outputs"][-1]["data"]["text/plain"] == ["5"]
    assert time.monotonic() - started_at < engine.SHUTDOWN_GRACE, "the kernel ended when it was asked to"


def test_what_a_cell_has_changed_stays_for_the_next(run):
    copy = run(
        "import time, warnings, sys\nsleep, time.sleep = time.sleep, None\nwarnings.simplefilter('error')\n"
        "sys.stdout.extra = 1",
        "print(time.sleep, sys.stdout.extra)\ntry:\n    warnings.warn('x')\nexcept UserWarning:\n    print('an error')",
    )
    assert text(copy) == "None 1\nan error\n"


# A kernel that hangs, and one that only looks so.


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(liveness, "PROBE_PERIOD", 0.5)
    monkeypatch.setattr(liveness, "HANG_TIMEOUT", 2.5)
    monkeypatch.setattr(engine, "SHUTDOWN_GRACE_FAILED", 0.5)


HANGS = [
    "import ctypes; ctypes.PyDLL(None).sleep(600)",  # holds the lock and waits
    "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    # no answer leaves any more
    "get_ipython().kernel.execute_request = None\nget_ipython().kernel.session.send = lambda *a, **k: None",
]


@pytest.mark.parametrize("cell", HANGS)
def test_a_kernel_that_hangs_is_ended(run, cell, impatient):
    with pytest.raises(
        NotebookError, match=r"cell \[1\]: its kernel neither answered nor used the CPU for 2.5 seconds"
    ):
        run(cell, "print('never')")


COMPUTES = [
    "import re; re.match('(a|aa)+$', 'a' * 34 + 'b')",  # holds the lock for seconds
    "!sleep 3.5",
    "await __import__('asyncio').sleep(3.5)",
]


def test_cells_that_take_long_are_not_ended(run, impatient):
    run(*COMPUTES)


# Output without end.

ENDLESS = {
    "print": "for _ in range(300): print('x' * 10_000)",
    "stderr": "import sys\nfor _ in range(300): print('x' * 10_000, file=sys.stderr)",
    "display": "for i in range(3_000): display(i)",
    "progress bar": "for i in range(300): print('\\r' + '#' * 10_000, end='', flush=True)",
    "one large output": "from IPython.display import HTML\nHTML('x' * 3_000_000)",
    "a command": "!yes | head -c 3000000",
    "an error": "raise ValueError('x' * 3_000_000)",
    "file descriptor": "import os\nfor _ in range(300): os.write(1, b'x' * 10_000)",
    "updates": "h = display(1, display_id=True)\nfor i in range(300): h.update('x' * 10_000)",
}


@pytest.mark.parametrize("what", ENDLESS)
def test_output_is_bounded_and_what_is_beyond_is_stated(run, tmp_path, monkeypatch, what):
    monkeypatch.setenv("MLNB_OUTPUT_LIMIT_MB", "1")
    try:
        copy = run(ENDLESS[what])
    except NotebookError:
        copy = cells.read(tmp_path / "out.ipynb")
    log = tmp_path / "out.log"
    assert (tmp_path / "out.ipynb").stat().st_size + (
        log.stat().st_size if log.exists() else 0
    ) < 5_000_000  # lines are quoted
    if what == "an error":
        assert "ValueError" in json.dumps(copy["cells"])
    else:
        assert "bytes of output are left out, since the notebook has reached output_limit_mb" in text(copy, "stderr")


def test_cells_share_the_limit(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLNB_OUTPUT_LIMIT_MB", "1")
    copy = run(*["print('x' * 400_000)"] * 4, "print('end')")
    beyond = ["left out" in json.dumps(c["outputs"]) for c in copy["cells"]]
    assert beyond[:2] == [False, False] and beyond[3] and (tmp_path / "out.ipynb").stat().st_size < 1_100_000


def test_memory_stays_bounded_where_a_cell_prints_for_ever(tmp_path):
    path = write(tmp_path / "task.ipynb", ["while True: print('x' * 100_000)"])
    program = (
        "import resource, sys\nfrom mlnb.notebooks.execute import execute\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try:\n    execute({str(path)!r}, 'out.ipynb', timeout=4)\nexcept Exception as e:\n    print(e)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    env = {**os.environ, "MLNB_OUTPUT_LIMIT_MB": "2"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "took longer than 4 seconds" in lines[0] and int(lines[-1]) < 200_000, done.stdout + done.stderr
    assert "bytes of output are left out" in (tmp_path / "out.ipynb").read_text()


# How a process ended.


def test_memory_is_blamed_only_after_an_out_of_memory_kill(tmp_path, monkeypatch):
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 2\noom_kill 2\n")
    monkeypatch.setattr(liveness, "_COUNTS", (str(tmp_path / "absent"), str(events)))
    assert liveness.exit_reason(-9, 1) == "ended by SIGKILL, because the system ran out of memory"
    assert liveness.exit_reason(-9, 2) == "ended by SIGKILL" and liveness.exit_reason(-11, 1) == "ended by SIGSEGV"
    assert (
        liveness.exit_reason(3, 1) == "ended with exit code 3"
        and liveness.exit_reason(-100, 1) == "ended by signal 100"
    )
    events.unlink()
    assert liveness.oom_kill_count() == 0
