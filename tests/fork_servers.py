"""Fork servers of a test's own: in a short private folder, ended with all their children when the test is over."""

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

from waiting import is_alive, until

from mlnb.notebooks import kernels

SMALL = kernels.KernelOptions(preload=("ipykernel",), pool=0, idle_timeout=120)  # comes up at once
WORK = '''
"""What workers of the tests do."""
import os, sys


def answer(connection):
    "Evaluate one expression a line; end with 7 when the caller is done"
    with connection.makefile("rwb") as lines:
        for line in lines:
            lines.write(repr(eval(line, globals())).encode() + b"\\n")
            lines.flush()
    return 7


def fail(connection):
    raise ValueError("no such month")


def leave(connection):
    file = open("left.txt", "w")
    file.write("written")
    globals()["kept"] = file
    sys.exit(3)


def sleep(connection):
    import subprocess, time
    child = subprocess.Popen(["sleep", "600"])
    connection.sendall(f"{child.pid}\\n".encode())
    time.sleep(600)
'''


@contextlib.contextmanager
def private_folder():
    "MLNB_RUNTIME_DIR is a new folder in here; whatever runs there afterwards is ended"
    before, folder = os.environ.get("MLNB_RUNTIME_DIR"), tempfile.mkdtemp(prefix="mlnb-")
    kernels.SERVER_TIMEOUT = kernels.LOADING_TIMEOUT = 120  # a busy machine must not turn a warm start into a cold one
    os.environ["MLNB_RUNTIME_DIR"] = folder
    try:
        yield Path(folder)
        servers = [server["pid"] for server in kernels.stop(kill=True)]
        until(lambda: not any(map(is_alive, servers)))
    finally:
        os.environ.pop("MLNB_RUNTIME_DIR")
        if before is not None:
            os.environ["MLNB_RUNTIME_DIR"] = before
        shutil.rmtree(folder, ignore_errors=True)


def ask(worker, expression):
    "The value of an expression in a worker that runs `answer`"
    worker.socket.sendall(expression.encode() + b"\n")
    text = b""
    while not text.endswith(b"\n"):
        data = worker.socket.recv(1 << 20)
        assert data, "the worker ended"
        text += data
    return eval(text, {"inf": float("inf"), "nan": float("nan")})


def dismiss(worker):
    "End a worker that runs `answer`"
    worker.socket.close()
    code = worker.wait(60)
    worker.close()
    return code


def loaded(count=1, pool=0):
    "Wait until `count` servers have imported everything and have `pool` kernels ahead; what they say"

    def done():
        servers = kernels.status()
        ahead = all(sum(c["kind"] == "pool" and c["ready"] for c in s.get("children", [])) >= pool for s in servers)
        return servers if len(servers) == count and ahead and not any(s.get("waiting", True) for s in servers) else None

    return until(done, "a loaded server")


def kill(pid):
    os.kill(pid, signal.SIGKILL)
