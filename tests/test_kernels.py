"""The client of the fork server: workers, cold starts with their reason, settings, the command."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest
from fork_servers import SMALL, WORK, ask, dismiss, private_folder
from waiting import is_alive, until

from mlnb.notebooks import kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm kernels need Linux")


@pytest.fixture
def folder():
    with private_folder() as folder:
        yield folder


@pytest.fixture
def project(tmp_path):
    "A working folder with a module of workers"
    (tmp_path / "work.py").write_text(WORK)
    return tmp_path


@pytest.fixture(params=["forked", "cold"])
def start(request, folder, project):
    "A function that starts a worker, once warm and once cold"

    def begin(target, **more):
        worker = kernels.fork_worker(target, cwd=project, options=SMALL, cold=request.param == "cold", **more)
        assert worker.how == request.param
        return worker

    return begin


def test_a_worker_answers_and_tells_its_exit_code(start, project):
    worker = start("work:answer")
    assert worker.poll() is None and worker.exitcode is None
    assert ask(worker, "(os.getpid(), os.getcwd())") == (worker.pid, str(project))
    with pytest.raises(TimeoutError):
        worker.wait(0.05)
    assert dismiss(worker) == 7 == worker.exitcode


def test_end_of_file_tells_of_the_end(start):
    worker = start("work:answer")
    ask(worker, "__import__('threading').Timer(0.1, os._exit, (5,)).start()")
    assert worker.socket.recv(1) == b""
    assert worker.wait(60) == 5


def test_an_exception_is_told_on_stderr(start, project):
    with (project / "stderr").open("wb") as file:
        worker = start("work:fail", stderr=file)
        assert worker.wait(60) == 1
    assert "ValueError: no such month" in (project / "stderr").read_text()
    assert worker.socket.recv(1) == b""


def test_a_missing_target_is_told_too(start, project):
    with (project / "stderr").open("wb") as file:
        assert start("no_such_module:run", stderr=file).wait(60) == 1
    assert "No module named 'no_such_module'" in (project / "stderr").read_text()


def test_files_are_written_at_the_end(start, project):
    assert start("work:leave").wait(60) == 3
    assert (project / "left.txt").read_text() == "written"


def test_kill_ends_what_it_started_as_well(start):
    worker = start("work:sleep")
    grandchild = int(worker.socket.recv(100))
    assert is_alive(grandchild)
    worker.kill()
    assert worker.wait(60) == -signal.SIGKILL
    until(lambda: not is_alive(grandchild))
    worker.kill()  # nothing to do
    worker.close()


def test_output_goes_where_it_should(start, project):
    with (project / "out").open("wb") as file:
        worker = start("work:answer", stdout=file)
        ask(worker, "print('said')")
        ask(worker, "os.system('echo child')")
        assert dismiss(worker) == 7
    assert sorted((project / "out").read_text().split()) == ["child", "said"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"options": kernels.KernelOptions(warm=False)}, "warm_kernels is false in the settings"),
        ({"env": {**os.environ, "PYTHONPATH": "src"}}, "PYTHONPATH has a relative folder"),
    ],
)
def test_doubt_is_a_cold_start_with_one_line(folder, project, caplog, more, reason):
    caplog.set_level(logging.INFO, "mlnb.kernels")
    worker = kernels.fork_worker("work:answer", cwd=project, **more)
    assert worker.how == "cold" and dismiss(worker) == 7
    assert [r.getMessage() for r in caplog.records] == [f"worker work:answer starts cold: {reason}"]
    assert kernels.status() == []


def test_a_server_that_forks_too_late_shares_no_socket_with_the_cold_worker(folder, project, monkeypatch, caplog):
    client_socket, servers = socket.socketpair()
    monkeypatch.setattr(kernels, "_connect", lambda *_: client_socket)
    monkeypatch.setattr(kernels, "LOADING_TIMEOUT", 0.1)
    worker = kernels.fork_worker("work:answer", cwd=project, options=SMALL)
    assert worker.how == "cold" and "still importing" in caplog.text
    _, fds, _, _ = socket.recv_fds(servers, 65536, 8)
    with servers, socket.socket(fileno=fds[2]) as late:
        assert late.recv(1) == b"", "the late worker finds nobody at the other end"
    assert ask(worker, "1 + 1") == 2 and dismiss(worker) == 7
    for fd in fds[:2]:
        os.close(fd)


def test_a_matplotlibrc_beside_the_notebook_is_doubt(folder, project, caplog):
    (project / "matplotlibrc").write_text("backend: svg\n")
    worker = kernels.fork_worker("work:answer", cwd=project, options=SMALL)
    assert worker.how == "cold" and dismiss(worker) == 7
    assert "has a matplotlibrc, which matplotlib reads when it is imported" in caplog.text


def test_a_folder_that_others_can_enter_is_not_used(folder, project, caplog):
    folder.chmod(0o755)
    worker = kernels.fork_worker("work:answer", cwd=project, options=SMALL)
    assert worker.how == "cold" and dismiss(worker) == 7
    assert "is not private to this user; run chmod 700 on it" in caplog.text
    folder.chmod(0o700)


def test_a_path_too_long_for_a_socket(folder, project, monkeypatch, caplog):
    monkeypatch.setenv("MLNB_RUNTIME_DIR", str(folder / ("x" * 100)))
    worker = kernels.fork_worker("work:answer", cwd=project, options=SMALL)
    assert worker.how == "cold" and dismiss(worker) == 7
    assert "is too long for a socket; set MLNB_RUNTIME_DIR to a short path" in caplog.text


def test_settings(tmp_path, monkeypatch):
    for name in ("WARM_KERNELS", "KERNEL_PRELOAD", "KERNEL_IDLE_MINUTES", "KERNEL_POOL"):
        monkeypatch.delenv(f"MLNB_{name}", raising=False)
    assert kernels.find_options(tmp_path) == kernels.KernelOptions()
    table = 'warm_kernels = false\nkernel_preload = ["numpy", "polars"]\nkernel_idle_minutes = 5\nkernel_pool = 0\n'
    (tmp_path / "pyproject.toml").write_text(f"[tool.mlnb]\n{table}")
    assert kernels.find_options(tmp_path) == kernels.KernelOptions(
        False, ("numpy", "polars"), 300.0, 0, (str(tmp_path),)
    )
    monkeypatch.setenv("MLNB_KERNEL_PRELOAD", "numpy")
    assert kernels.find_options(tmp_path).preload == ("numpy",)


def test_settings_in_error_are_told_and_the_defaults_hold(tmp_path, caplog):
    (tmp_path / "pyproject.toml").write_text('[tool.mlnb]\nkernel_pool = "many"\n')
    assert kernels.find_options(tmp_path) == kernels.KernelOptions()
    assert "setting 'kernel_pool' has value 'many'; write kernel_pool = 1" in caplog.text


KEY = "import ctypes, os, resource\nfrom mlnb.notebooks import kernels\n{}\nprint(kernels.server_key((), {{}}))"


def key_of(state):
    "The key of the server that a process would ask once it is confined"
    return subprocess.run([sys.executable, "-c", KEY.format(state)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "state",
    [
        "ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)",  # PR_SET_NO_NEW_PRIVS
        "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
        "open('/proc/self/oom_score_adj', 'w').write('900')",
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))",
    ],
    ids=["no new privileges", "scheduler", "first to go", "limits"],
)
def test_who_is_confined_has_a_server_that_is_too(state):
    assert key_of(state) != key_of("")


def mlnb(*words):
    call = [sys.executable, "-c", "from mlnb.cli.main import main; main()", "kernels", *words]
    return subprocess.run(call, capture_output=True, text=True, timeout=120)


def test_the_command_shows_and_stops_servers(folder, project):
    assert mlnb().stdout == "No fork server is running.\n"
    worker = kernels.fork_worker("work:answer", cwd=project, options=SMALL)
    ask(worker, "1")
    (server,) = json.loads(mlnb("--json").stdout)
    assert [c["pid"] for c in server["children"]] == [worker.pid]
    shown = mlnb().stdout
    assert str(server["pid"]) in shown and "worker" in shown
    wrong = mlnb("stop", "1")
    assert wrong.returncode == 1 and "no fork server has process id 1; see: mlnb kernels" in wrong.stderr
    assert f"{server['pid']} ends its 1" in mlnb("stop", str(server["pid"]), "--kill").stdout
    assert worker.wait(60) == -signal.SIGTERM
    until(lambda: not is_alive(server["pid"]))
    worker.close()
    assert mlnb().stdout == "No fork server is running.\n"


def test_the_client_is_light():
    code = "import sys, mlnb.notebooks.kernels; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jupyter_client", "zmq", "numpy", "subprocess", "tornado", "traitlets"} & set(loaded)
