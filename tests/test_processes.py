"""A process that was started beside or below another ends with it, whatever it is doing when that is killed."""

import os
import socket
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
import toy_project
from waiting import is_alive, until

# An import that never ends: what a helper is doing while its parent is killed
STALL = """
import os, sys, time
class Stall:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["STALL"]:
            open(os.environ["STALLED"], "w").close()
            time.sleep(3600)
if os.environ.get("STALLED"):
    sys.meta_path.insert(0, Stall())
"""
SETTINGS = "from dataclasses import replace; from mlnb.project.settings import load_settings; s = load_settings();"
HELPERS = {  # name: what its parent runs, and the import at which the helper stands still
    "compactor": (
        "from mlnb.serving.compactor import start_background_compactor; start_background_compactor(s)",
        "mlnb.serving.labels",
    ),
    "shadow": ("from mlnb.serving.shadow import Shadow; Shadow(s, 'products/bundle')._start()", "toy.model"),
}


def killed(parent: subprocess.Popen, ready) -> list[psutil.Process]:
    "The children of a process that is killed once `ready()` holds; those that are still there a minute later"
    try:
        until(lambda: parent.poll() is not None or ready(), "the helper")
        children = psutil.Process(parent.pid).children(recursive=True)
        assert children
    finally:
        parent.kill()
        parent.wait()
    return psutil.wait_procs(children, timeout=60)[1]


def started(toy, code: str, **variables) -> subprocess.Popen:
    env = toy_project.environment(toy) | variables
    return subprocess.Popen(
        [sys.executable, "-c", f"{SETTINGS} {code}; import time; time.sleep(3600)"], cwd=toy, env=env
    )


@pytest.mark.parametrize("helper", HELPERS)
def test_a_helper_that_stands_still_ends_with_its_parent(toy, tmp_path, helper):
    code, stall = HELPERS[helper]
    (tmp_path / "sitecustomize.py").write_text(STALL)
    where = {"MLNB_MODEL_CACHE": str(tmp_path / "versions"), "MLNB_PREDICTIONS": str(tmp_path / "log"), "STALL": stall}
    path = f"{tmp_path}{os.pathsep}{toy}"
    parent = started(toy, code, PYTHONPATH=path, STALLED=str(tmp_path / "stalled"), **where)
    assert not killed(parent, lambda: (tmp_path / "stalled").exists())


def test_a_watcher_that_waits_for_a_server_ends_with_its_parent(toy, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        silent.setblocking(False)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = (
            "from mlnb.models.watcher import ensure_watcher; p = ensure_watcher(replace(s, serve_from='models:/toy'))"
        )
        parent = started(toy, code, MLNB_MODEL_CACHE=str(tmp_path), MLNB_TRACKING=url)
        connections = []

        def asked():
            with suppress(BlockingIOError):
                connections.append(silent.accept()[0])
            return connections

        assert not killed(parent, asked)
        for connection in connections:
            connection.close()


PARENT_GONE = """
import os, subprocess, sys
from mlnb.project.processes import {name}
{call}
silent = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], preexec_fn={preexec}, **silent)
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def orphan(code: str, name="end_with_parent", call="", preexec="None") -> int:
    "The process id of a child whose parent has killed itself at once"
    parent = PARENT_GONE.format(name=name, call=call, preexec=preexec)
    return int(subprocess.run([sys.executable, "-c", parent, code], stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.parametrize("handler", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "])
def test_a_child_whose_parent_is_gone_when_it_begins_ends_although_it_hangs(handler):
    code = (
        "import os; parent = os.getppid(); import mlnb.project.processes as p; p.KILL_DELAY_SECONDS = 0.5; " + handler
    )
    child = orphan(code + "p.end_with_parent(parent + 1); import time; time.sleep(3600)")
    until(lambda: not is_alive(child), "the end of the child")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone sends a signal when a parent ends")
def test_a_child_that_runs_no_code_of_ours_ends_with_its_parent():
    more = {"name": "end_forks_with_this_process", "call": "end_forks_with_this_process()", "preexec": "os.setsid"}
    child = orphan("import time; time.sleep(3600)", **more)
    until(lambda: not is_alive(child), "the end of the child")


def test_a_stopped_parent_ends_nothing(tmp_path):
    code = "from mlnb.project.processes import end_with_parent; import os, time; end_with_parent(os.getppid()); "
    code += "print(1, flush=True); time.sleep(3600)"
    parent = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {code!r}]); "
    parent += "print(c.pid, flush=True); c.wait()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(process.stdout.readline()))
    assert process.stdout.readline() == "1\n"
    psutil.Process(process.pid).suspend()
    assert not psutil.wait_procs([child], timeout=1.5)[0]
    process.kill()
    process.communicate()
    assert psutil.wait_procs([child], timeout=60)[0]
