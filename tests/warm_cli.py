"""`mlnb` as a process of its own that starts at once: forked from a server that has imported what commands import.

Most of the time of a command in a test is the import of pandas, pyarrow and SQLAlchemy. A forked process is as real
as a new one: it has its own arguments, working folder, environment, files and exit code. Tests of start-up, imports
and signals start Python themselves.
"""

import atexit
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path

LIBRARIES = (
    "numpy",
    "pandas",
    "pyarrow.parquet",
    "pyarrow.compute",
    "pyarrow.dataset",
    "sqlalchemy",
    "alembic",
    "rich.console",
    "msgspec",
)
ROOMS = ("cli", "data", "models", "monitoring", "pipelines", "serving")
LEFT_OUT = ("bento", "training")  # BentoML reads variables when it is imported; PyTorch is used by few commands


def run(words, *, cwd, env, input="", timeout=600, umask=None, safe_path=False) -> subprocess.CompletedProcess:
    "`mlnb WORDS` in the folder `cwd`, as `subprocess.run(..., capture_output=True, text=True)` would run it"
    if sys.platform != "linux":  # frameworks of macOS do not survive a fork
        command = [
            sys.executable,
            *(["-P"] if safe_path else []),
            "-c",
            "from mlnb.cli.main import main; main()",
            *map(str, words),
        ]
        return subprocess.run(
            command,
            cwd=cwd,
            env=env,
            input=input,
            timeout=timeout,
            umask=-1 if umask is None else umask,
            capture_output=True,
            text=True,
        )
    request = {
        "words": [str(word) for word in words],
        "cwd": str(cwd),
        "env": dict(env),
        "umask": umask,
        "safe_path": safe_path,
    }
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(input.encode())
        files[0].seek(0)
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(timeout)
        connection.connect(_server())
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [file.fileno() for file in files])
        code = int(connection.makefile().readline())
        texts = []
        for file in files[1:]:
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(words, code, *texts)


@cache
def _server() -> str:
    "The socket of this process's server, which ends with it"
    folder = tempfile.TemporaryDirectory(prefix="mlnb-cli-")
    path = f"{folder.name}/socket"
    server = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE)
    atexit.register(folder.cleanup)
    atexit.register(server.kill)
    while not os.path.exists(path):
        assert server.poll() is None, "the server of warm commands ended"
        time.sleep(0.01)
    return path


def serve(path: str) -> None:
    "Answer requests until the process that started this one ends"
    for name in LIBRARIES:
        importlib.import_module(name)
    for room in ROOMS:
        for file in sorted((Path(__file__).parents[1] / "mlnb" / room).glob("[!_]*.py")):
            if file.stem not in LEFT_OUT:
                importlib.import_module(f"mlnb.{room}.{file.stem}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child is waited for here
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(16)
        os.rename(f"{path}.new", path)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _answer(connection: socket.socket) -> None:
    "Run the command of a connection in a child, and send its exit code"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    if (child := os.fork()) == 0:
        connection.close()
        _become_command(json.loads(message), descriptors)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _become_command(request: dict, descriptors: list[int]) -> None:
    "Run `mlnb` in this process as if Python had just started, and end"
    for target, source in enumerate(descriptors):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    if request["umask"] is not None:
        os.umask(request["umask"])
    sys.argv = ["mlnb", *request["words"]]
    folders = [folder for folder in request["env"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = folders if request["safe_path"] else ["", *folders]
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        errors = "strict" if name == "stdout" else "backslashreplace"
        stream = os.fdopen(descriptor, "w", encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.stdin = os.fdopen(0, closefd=False)
    os._exit(_exit_code())


def _exit_code() -> int:
    "The exit code of the command, after all that runs at the end of a process"
    from mlnb.cli.main import main

    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        traceback.print_exc()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
