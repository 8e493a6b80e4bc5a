"""The fork server: what its children are, when it refuses, how it comes and goes."""

import json
import os
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
from fork_servers import SMALL, WORK, ask, dismiss, kill, loaded, private_folder
from jupyter_client.session import Session
from waiting import is_alive, until

from mlnb.notebooks import forkserver, kernels

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


def warm(project, target="work:answer", **more):
    "A worker that must have been forked"
    worker = kernels.fork_worker(target, cwd=project, options=SMALL, **more)
    assert worker.how == "forked"
    return worker


FACTS = """{
    "env": {k: v for k, v in os.environ.items() if k not in ("_", "PYDEVD_USE_FRAME_EVAL")}, "cwd": os.getcwd(),
    "argv": sys.argv, "path": sys.path, "flags": tuple(sys.flags),
    "umask": [os.umask(0o22), os.umask(0o22)][1], "session": os.getsid(0) == os.getpid(),
    "stdin": os.readlink("/proc/self/fd/0"),
    "sigint": __import__("signal").getsignal(2).__name__, "mask": __import__("signal").pthread_sigmask(0, []),
    "main": sys.modules["__main__"].__name__,
    "executable": sys.executable, "orig_argv": sys.orig_argv[:2],
    "own": [m for m in sys.modules if m.split(".")[0] == "mlnb"],
    "threads": __import__("threading").active_count(), "trace": sys.gettrace(),
    "hook": sys.excepthook is sys.__excepthook__,
}"""


def test_a_worker_is_what_a_new_interpreter_would_be(folder, project):
    environment = {**os.environ, "MLNB_TEST_WORD": "é ü", "TMPDIR": str(project)}
    facts = " ".join(FACTS.split("\n"))
    one = warm(project, env=environment)
    two = kernels.fork_worker("work:answer", cwd=project, env=environment, cold=True)
    ours, theirs = ask(one, facts), ask(two, facts)
    assert ours == theirs
    assert ours["cwd"] == str(project) and ours["own"] == [] and ours["env"]["MLNB_TEST_WORD"] == "é ü"
    assert dismiss(one) == dismiss(two) == 7


def test_descriptors_of_the_server_stay_there(folder, project):
    first, second = warm(project), warm(project)
    fds = "{f: os.readlink(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd') "
    fds += "if os.path.lexists(f'/proc/self/fd/{f}')}"
    links = list(ask(second, fds).values())
    assert not [link for link in links if "epoll" in link or "pidfd" in link or str(folder) in link]
    assert len([link for link in links if link.startswith("socket:")]) == 1
    dismiss(first), dismiss(second)


def test_seeds_differ_and_state_is_not_shared(folder, project):
    drawn = []
    for _ in range(3):
        worker = warm(project)
        drawn.append(
            ask(
                worker,
                "(__import__('random').random(), __import__('numpy').random.rand(), __import__('uuid').uuid4().hex)",
            )
        )
        ask(worker, "setattr(sys, 'left_behind', 1)")
        assert dismiss(worker) == 7
    assert all(len(set(column)) == 3 for column in zip(*drawn, strict=True))
    worker = warm(project)
    assert ask(worker, "hasattr(sys, 'left_behind')") is False
    dismiss(worker)


def test_first_party_code_is_never_stale(folder, project):
    (project / "features.py").write_text("value = 1\n")
    for value in (1, 22, 333):
        (project / "features.py").write_text(f"value = {value}\n")
        worker = warm(project)
        assert ask(worker, "__import__('features').value") == value
        dismiss(worker)


def test_what_is_not_an_installed_library_is_not_imported_ahead(folder, project, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(project))
    options = kernels.KernelOptions(preload=("work", "no_such_library", "mlnb.doctor", "json"), pool=0, idle_timeout=60)
    dismiss(kernels.fork_worker("work:answer", cwd=project, options=options))
    (server,) = loaded()
    assert server["skipped"]["work"] == "a project's own code, which changes"
    assert server["skipped"]["no_such_library"] == "not installed"
    assert "json" in server["loaded"]
    worker = kernels.fork_worker("work:answer", cwd=project, options=options)
    assert worker.how == "forked" and ask(worker, "[m for m in sys.modules if m.split('.')[0] == 'mlnb']") == []
    dismiss(worker)


CHECK = """
import _thread, sys, threading, time
from mlnb.notebooks import forkserver
{}
try:
    forkserver.check_fork()
    print("fork")
except forkserver.RequestRefused as e:
    print(e)
"""


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("import numpy, torch", "fork"),  # the pools of both end at a fork by themselves
        (
            "threading.Thread(target=time.sleep, args=(60,), daemon=True, name='poller').start()",
            "Python threads run in the server: poller",
        ),
        ("import torch; torch.cuda.is_initialized = lambda: True", "CUDA was touched in the server"),
        ("forkserver.DEVICES = ('/dev/zero',); held = open('/dev/zero')", "CUDA was touched in the server"),
        (
            "_thread.start_new_thread(time.sleep, (60,))",
            "1 threads of a library run in the server and do not end at a fork",
        ),
    ],
)
def test_a_fork_is_refused_where_it_is_in_doubt(state, reason):
    done = subprocess.run([sys.executable, "-c", CHECK.format(state)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == reason, done.stderr


def test_a_refusal_is_a_cold_start_with_its_reason(folder, project, monkeypatch, caplog):
    monkeypatch.setenv("JE_ARROW_MALLOC_CONF", "background_thread:true")  # a thread that does not end at a fork
    options = kernels.KernelOptions(preload=("pyarrow",), pool=0, idle_timeout=60)
    dismiss(kernels.fork_worker("work:answer", cwd=project, options=options))
    loaded()
    caplog.clear()
    worker = kernels.fork_worker("work:answer", cwd=project, options=options)
    assert worker.how == "cold" and dismiss(worker) == 7
    assert "worker work:answer starts cold: 1 threads of a library run in the server" in caplog.text


def test_it_ends_itself_when_idle(folder, project):
    worker = kernels.fork_worker(
        "work:answer", cwd=project, options=kernels.KernelOptions(preload=("json",), pool=0, idle_timeout=0.3)
    )
    (server,) = kernels.status()
    time.sleep(0.6)
    assert is_alive(server["pid"]), "a server with a child at work is not idle"
    dismiss(worker)
    until(lambda: not is_alive(server["pid"]))
    assert list(folder.iterdir()) == []


def test_those_who_start_at_once_get_one_server(folder, project):
    code = """
        import sys
        from mlnb.notebooks import kernels
        kernels.SERVER_TIMEOUT = kernels.LOADING_TIMEOUT = 120
        options = kernels.KernelOptions(preload=("json",), pool=0, idle_timeout=60)
        worker = kernels.fork_worker("work:answer", options=options)
        worker.socket.sendall(b"os.getppid()\\n")
        print(worker.how, worker.socket.recv(100).decode())
    """
    call = [sys.executable, "-c", textwrap.dedent(code)]
    started = [subprocess.Popen(call, cwd=project, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    answers = {p.communicate(timeout=120)[0].strip() for p in started}
    (server,) = kernels.status()
    assert answers == {f"forked {server['pid']}"}


def test_a_killed_server_is_replaced_and_its_children_live_on(folder, project):
    first = warm(project)
    (old,) = kernels.status()
    kill(old["pid"])
    second = warm(project)
    (new,) = kernels.status()
    assert new["pid"] != old["pid"]
    assert ask(first, "6 * 7") == 42 and first.poll() is None
    assert dismiss(second) == 7
    assert dismiss(first) == kernels.UNKNOWN_EXIT_CODE, "nobody is left who knows its exit code"


def test_other_variables_get_another_server(folder, project):
    for more in (
        {"MLNB_TEST_WORD": "x"},
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"OMP_NUM_THREADS": "3"},
        {"TZ": "Europe/Berlin"},
    ):
        worker = warm(project, env={**os.environ, **more})
        (name,) = more
        assert ask(worker, f"os.environ[{name!r}]") == more[name]
        dismiss(worker)
    assert len(kernels.status()) == 3


def test_packages_that_changed_get_another_server(folder, monkeypatch):
    before = kernels.server_key(("json",), {})
    monkeypatch.setattr(kernels, "_installed", lambda: [["site-packages", 1]])
    assert kernels.server_key(("json",), {}) != before
    assert kernels.server_key(("json", "numpy"), {}) != kernels.server_key(("json",), {})


OWNER = """
import sys, time
from mlnb.notebooks import kernels
kernels.SERVER_TIMEOUT = kernels.LOADING_TIMEOUT = 120
worker = kernels.fork_worker("work:sleep", options=kernels.KernelOptions(preload=("json",), pool=0, idle_timeout=60))
print(worker.how, worker.pid, worker.socket.recv(100).decode(), flush=True)
time.sleep(600)
"""


def test_a_killed_owner_leaves_nothing_behind(folder, project):
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=project, stdout=subprocess.PIPE, text=True)
    how, worker, grandchild = owner.stdout.readline().split()
    assert how == "forked" and is_alive(worker) and is_alive(grandchild)
    owner.kill()
    owner.communicate()
    until(lambda: not is_alive(worker) and not is_alive(grandchild))


def test_a_stopped_server_ends_with_its_last_child(folder, project):
    worker = warm(project)
    (server,) = kernels.status()
    assert kernels.stop() == [{"pid": server["pid"], "children": 1}]
    assert kernels.status() == [], "nobody finds it any more"
    assert ask(worker, "1 + 1") == 2 and is_alive(server["pid"])
    other = warm(project)
    assert ask(other, "os.getppid()") != server["pid"]
    assert dismiss(worker) == dismiss(other) == 7
    until(lambda: not is_alive(server["pid"]))
    assert len(kernels.status()) == 1


def test_only_this_user_can_connect(folder, project):
    dismiss(warm(project))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [p.stat().st_mode & 0o77 for p in folder.glob("*.sock")] == [0]


def test_a_server_whose_folder_was_removed_ends(folder, project):
    worker = warm(project)
    (server,) = kernels.status()
    for path in folder.iterdir():
        path.unlink()
    assert dismiss(worker) == 7
    until(lambda: not is_alive(server["pid"]))


def test_nonsense_is_refused_and_the_server_lives_on(folder, project):
    dismiss(warm(project))
    for request in ({"do": "dance"}, {"do": "worker"}, {}):
        assert list(kernels._ask_each(request)[0]) == ["pid", "busy"]
    assert len(kernels.status()) == 1
    dismiss(warm(project))


def test_a_busy_machine_does_not_keep_the_pool_empty_for_ever(monkeypatch):
    def refuse():
        raise forkserver.RequestRefused("a kernel would be made now")

    monkeypatch.setattr(forkserver, "_runnable", lambda: 1_000_000)
    monkeypatch.setattr(forkserver, "check_fork", refuse)
    server = object.__new__(forkserver.ForkServer)
    server._wants_pool, server.failures, server.active = lambda: True, 0, time.monotonic() + 3600
    server._refill()
    assert server.failures == 0, "it waits for the machine"
    server.active -= 7200
    server._refill()
    assert server.failures == forkserver.MAX_POOL_FAILURES


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "A server that has imported all of the default list, and a folder of workers"
    project = tmp_path_factory.mktemp("project")
    (project / "work.py").write_text(WORK + COMPUTE)
    with private_folder(), pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # of conftest.py
            patch.delenv(name, raising=False)
        options = kernels.KernelOptions(idle_timeout=300, pool=0)
        dismiss(kernels.fork_worker("work:answer", cwd=project, options=options))
        loaded()
        yield lambda **more: kernels.fork_worker("work:answer", cwd=project, options=options, **more)


COMPUTE = """

def computed(work):
    "Result and threads"
    return work(), len(os.listdir("/proc/self/task"))


def matmul():
    import numpy as np
    a = np.arange(640_000.0).reshape(800, 800) / 1e6
    return float((a @ a.T).sum()), float(np.linalg.svd(a[:200, :200], compute_uv=False)[0])


def learn():
    import torch
    torch.manual_seed(0)
    linear = torch.nn.Linear(16 * 30 * 30, 10)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), linear)
    x = torch.randn(32, 3, 32, 32)
    loss = net(x).square().mean()
    loss.backward()
    a = torch.randn(700, 700, requires_grad=True)
    (a @ a).sum().backward()
    return loss.item(), net[0].weight.grad.sum().item(), a.grad.sum().item(), torch.get_num_threads()
"""


@pytest.mark.parametrize("work", ["matmul", "learn"])
def test_threads_compute_right_and_all_of_them(full, work):
    ours, theirs = full(), full(cold=True)
    assert (ours.how, theirs.how) == ("forked", "cold")
    assert ask(ours, "'torch' in sys.modules and 'pandas' in sys.modules") is True
    (here, threads_here), (there, threads_there) = ask(ours, f"computed({work})"), ask(theirs, f"computed({work})")
    assert here == pytest.approx(there, rel=1e-4)
    if len(os.sched_getaffinity(0)) > 1:
        assert threads_here > 1 and threads_there > 1
    assert dismiss(ours) == dismiss(theirs) == 7


def test_pools_of_threads_work_in_many_children(full):
    workers = [full() for _ in range(3)]
    assert {w.how for w in workers} == {"forked"}
    results = [ask(w, "(matmul(), learn())") for w in workers]
    for result in results:
        assert result[0] == pytest.approx(results[0][0])
        assert result[1] == pytest.approx(results[0][1], rel=1e-4)
    for worker in workers:
        dismiss(worker)


def test_cuda_was_not_touched(full):
    worker = full()
    assert ask(worker, "(lambda cuda: (cuda._is_in_bad_fork(), cuda.is_initialized()))(__import__('torch').cuda)") == (
        False,
        False,
    )
    dismiss(worker)


def test_a_backend_given_in_the_environment_is_used(full):
    for backend in ("svg", "pdf"):
        worker = full(env={**os.environ, "MPLBACKEND": backend})
        assert ask(worker, "__import__('matplotlib').get_backend()") == backend
        dismiss(worker)


def test_memory_is_shared(full):
    worker = full()
    ask(worker, "__import__('torch').ones(3).sum().item()")
    own = forkserver.memory(worker.pid)
    assert 0 < own["uss"] < 60e6 < own["rss"]
    dismiss(worker)


def test_status_is_one_document(full):
    (server,) = kernels.status()
    assert json.loads(json.dumps(server)) == server
    modules = {
        "numpy",
        "pandas",
        "pyarrow",
        "matplotlib.pyplot",
        "torch",
        "nbclient",
        "papermill.execute",
        "ipykernel.debugger",
    }
    assert modules <= set(server["loaded"])
    assert server["skipped"] == {} and server["waiting"] == []


def test_a_kernel_has_its_key_before_anybody_finds_its_sockets(tmp_path, monkeypatch):
    "It greets whoever subscribes, and a client takes nothing that is unsigned"
    ports = {name: number for number, name in enumerate(forkserver.PORTS, 1)}
    ahead, theirs = (str(tmp_path / name) for name in ("ahead", "theirs"))
    for number in ports.values():
        (tmp_path / f"ahead-{number}").touch()
    (tmp_path / "kernel.json").write_text(json.dumps({"ip": theirs, "key": "secret", **ports}))
    app = SimpleNamespace(
        ip=ahead, session=Session(key=b""), kernel=SimpleNamespace(record_ports=lambda ports: None), **ports
    )
    keys, rename = [], os.rename
    monkeypatch.setattr(forkserver.os, "rename", lambda old, new: (keys.append(app.session.key), rename(old, new)))
    forkserver._take_sockets(app, str(tmp_path / "kernel.json"))
    assert set(keys) == {b"secret"} and app.session.auth is not None
    assert {p.name for p in tmp_path.glob("theirs-*")} == {f"theirs-{number}" for number in ports.values()}
