"""The kernel `mlnb` under everything that starts kernels: jupyter_client, nbclient, papermill, Jupyter Server."""

import asyncio
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
from fork_servers import kill, loaded, private_folder
from jupyter_client.manager import KernelManager
from waiting import is_alive, until

from mlnb.notebooks import forkserver, kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm kernels need Linux")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    "Servers of these tests import no more than a kernel needs, unless a test says otherwise"
    monkeypatch.setenv("MLNB_KERNEL_PRELOAD", "ipykernel")
    monkeypatch.delenv("MLNB_KERNEL_POOL", raising=False)


@pytest.fixture
def folder(small):
    with private_folder() as folder:
        yield folder


@pytest.fixture(params=["pool", "forked", "cold"])
def how(request, folder, monkeypatch):
    "Each way in which a kernel may have come to be"
    if request.param == "cold":
        monkeypatch.setenv("MLNB_WARM_KERNELS", "false")
        return "cold"
    monkeypatch.setenv("MLNB_KERNEL_POOL", "1" if request.param == "pool" else "0")
    if request.param == "pool":
        ahead()
    return request.param


def ahead():
    "Have a server with a kernel in its pool"
    worker = kernels.fork_worker("builtins:repr")
    worker.wait(60)
    worker.close()
    loaded(pool=1)


class Kernel:
    "A kernel of jupyter_client's own manager, and its client"

    def __init__(self, name="mlnb", **launch):
        self.manager = KernelManager(kernel_name=name)
        self.manager.start_kernel(**launch)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(60)

    @property
    def how(self):
        return self.manager.provisioner.how

    @property
    def pid(self):
        return self.manager.provisioner.pid

    def run(self, code):
        "What the cell said, shown as one text"
        texts = []

        def hear(message):
            content = message["content"]
            error = ": ".join(content.get(k, "") for k in ("ename", "evalue"))
            texts.append(content.get("text") or content.get("data", {}).get("text/plain") or error)

        def on(message):
            if message["msg_type"] in ("stream", "execute_result", "error"):
                hear(message)

        self.client.execute_interactive(code, timeout=60, output_hook=on, allow_stdin=False)
        return "".join(texts)

    def close(self, now=False):
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=now)


@pytest.fixture
def kernel(how, tmp_path):
    made = Kernel(cwd=str(tmp_path), env={**os.environ, "MLNB_TEST_WORD": "here"})
    assert made.how == how
    yield made
    made.close(now=True)


def test_a_notebook_in_any_folder_imports_the_package_of_its_project(how, tmp_path):
    for name in ("pyproject.toml", "flat/__init__.py", "src/nested/__init__.py", "nbs/twice.py", "twice.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[tool.mlnb]\n" if name.endswith("toml") else "")
    kernel = Kernel(cwd=str(tmp_path / "nbs"))
    try:
        assert kernel.how == how
        shown = kernel.run("import flat, nested, twice; print(flat.__file__, nested.__file__, twice.__file__)")
        files = ("flat/__init__.py", "src/nested/__init__.py", "nbs/twice.py")
        assert shown.split() == [str(tmp_path / file) for file in files]
    finally:
        kernel.close(now=True)


def test_a_cell_runs_where_it_should(kernel, tmp_path):
    assert kernel.run(
        "import os, sys; print(os.getcwd(), os.environ['MLNB_TEST_WORD'], __name__, '__file__' in globals())"
    ) == (f"{tmp_path} here __main__ False\n")
    assert kernel.run("6 * 7") == "42"
    assert kernel.run("1 / 0") == "ZeroDivisionError: division by zero"
    assert kernel.run("%cd -q /\n%pwd") == "'/'"
    assert (
        kernel.run("print(len([m for m in sys.modules if m.split('.')[0] == 'mlnb']), sys.stdin is not None)")
        == "0 True\n"
    )
    assert kernel.run("!echo from a shell").split() == ["from", "a", "shell"]


FACTS = """
import os, sys, signal, json
print(json.dumps({
    "argv": [sys.argv[0], sys.argv[1], len(sys.argv)], "path": sys.path, "cwd": os.getcwd(), "flags": list(sys.flags),
    "env": {k: v for k, v in os.environ.items() if k not in ("_", "JPY_PARENT_PID", "OWNER")},
    "history": [str(d) for d in _dh],
    "sigint": str(signal.getsignal(signal.SIGINT)), "name": str(sys.modules["__main__"]), "session": __session__,
    "own": os.getsid(0) == os.getpid(), "umask": [os.umask(0o22), os.umask(0o22)][1],
    "hook": str(type(sys.displayhook)),
    "modules": "IPython" in sys.modules, "user": get_ipython().kernel.session.username,
    "start": get_ipython().starting_dir,
    "count": get_ipython().execution_count,
}))
"""


def test_a_warm_kernel_is_what_a_cold_one_would_be(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "ada")
    environment = {**os.environ, "JPY_SESSION_NAME": "delays.ipynb", "TERM": "dumb"}
    facts = []
    for how, variable, value in (("forked", "POOL", "0"), ("pool", "POOL", "1"), ("cold", None, None)):
        monkeypatch.setenv(*(f"MLNB_KERNEL_{variable}", value) if variable else ("MLNB_WARM_KERNELS", "false"))
        if how == "pool":
            ahead()
        kernel = Kernel(cwd=str(tmp_path), env=environment)
        assert kernel.how == how
        facts.append(json.loads(kernel.run(FACTS)))
        kernel.close()
    for name in facts[2]:
        assert facts[0][name] == facts[1][name] == facts[2][name], name


def interrupt(kernel):
    "Interrupt a cell, and find the kernel alive after it"
    asked = kernel.client.execute("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    while kernel.client.get_iopub_msg(timeout=60)["content"].get("text") != "begun\n":
        pass
    kernel.manager.interrupt_kernel()
    reply = kernel.client.get_shell_msg(timeout=60)
    while reply["parent_header"]["msg_id"] != asked:
        reply = kernel.client.get_shell_msg(timeout=60)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert until(lambda: kernel.run("'alive'") == "'alive'"), "requests that follow an error at once are dropped"


def test_interrupt(kernel):
    interrupt(kernel)


def test_shutdown_is_graceful_and_complete(kernel, folder, tmp_path):
    kernel.run(
        "import atexit; atexit.register(lambda: open('ended.txt', 'w').write('well')); f = open('open.txt', "
        "'w'); f.write('kept')"
    )
    pid, connection = kernel.pid, Path(kernel.manager.connection_file)
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel()
    until(lambda: not is_alive(pid))
    assert (tmp_path / "ended.txt").read_text() == "well"
    assert (tmp_path / "open.txt").read_text() == "kept"
    assert not connection.exists()
    assert not [p for p in folder.iterdir() if p.is_dir() and p.name.startswith("k")], "its sockets are gone"


def test_kill_ends_what_the_kernel_started(kernel):
    child = int(kernel.run("import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"))
    pid = kernel.pid
    kernel.manager.shutdown_kernel(now=True)
    until(lambda: not is_alive(pid) and not is_alive(child))


def test_restart_gives_a_new_kernel_to_the_same_client(kernel):
    kernel.run("x = 1")
    pid = kernel.pid
    for now in (False, True):
        kernel.manager.restart_kernel(now=now)
        kernel.client.wait_for_ready(60)
        assert kernel.run("'x' in globals()") == "False"
        assert kernel.pid != pid
        until(lambda pid=pid: not is_alive(pid))
        pid = kernel.pid


def test_a_kernel_that_dies_is_noticed(kernel):
    kernel.client.execute("import os; os._exit(3)")
    until(lambda: not kernel.manager.is_alive())
    assert asyncio.run(kernel.manager.provisioner.wait()) == 3
    assert not kernel.manager.has_kernel


def test_figures_are_shown_inline(folder, monkeypatch):
    monkeypatch.setenv("MLNB_KERNEL_PRELOAD", "ipykernel,matplotlib")
    ahead()
    kernel = Kernel()
    assert kernel.how == "pool"
    seen = []
    code = "import matplotlib.pyplot as plt; plt.plot([1, 2])"
    kernel.client.execute_interactive(code, timeout=60, output_hook=lambda m: seen.append(m["content"].get("data", {})))
    assert any("image/png" in data for data in seen)
    kernel.close()


def test_seeds_differ(folder):
    drawn = set()
    for _ in range(3):
        kernel = Kernel()
        drawn.add(kernel.run("import random, numpy; print(random.random(), numpy.random.rand())"))
        kernel.close(now=True)
    assert len(drawn) == 3


def test_configuration_of_ipython_is_read(folder, tmp_path, monkeypatch):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    ahead()
    (startup / "00-first.py").write_text("greeting = 'from startup'\n")
    kernel = Kernel()
    assert kernel.how == "forked", "the pool cannot know it"
    assert kernel.run("greeting") == "'from startup'"
    kernel.close()


def test_the_debugger_attaches(folder):
    ahead()
    kernel = Kernel()
    assert kernel.how == "pool"

    def debug(command, number, **arguments):
        content = {"type": "request", "seq": number, "command": command, "arguments": arguments}
        kernel.client.control_channel.send(kernel.client.session.msg("debug_request", content))
        return kernel.client.get_control_msg(timeout=60)["content"]

    assert debug("initialize", 1, clientID="test", adapterID="test")["success"]
    assert debug("attach", 2)["success"]
    code = "def f(x):\n    y = x + 1\n    return y\nf(41)"
    path = debug("dumpCell", 3, code=code)["body"]["sourcePath"]
    stop = debug("setBreakpoints", 4, breakpoints=[{"line": 2}], source={"path": path}, sourceModified=False)
    assert stop["body"]["breakpoints"][0]["verified"]
    assert debug("configurationDone", 5)["success"]
    kernel.client.execute(code)
    stopped = until(lambda: next((m for m in drain(kernel.client) if m["content"].get("event") == "stopped"), None))
    thread = stopped["content"]["body"]["threadId"]
    frame = debug("stackTrace", 6, threadId=thread)["body"]["stackFrames"][0]
    assert frame["line"] == 2
    debug("continue", 7, threadId=thread)
    kernel.close(now=True)


def drain(client):
    "Messages that have come on IOPub"
    messages = []
    while True:
        try:
            messages.append(client.get_iopub_msg(timeout=0.2))
        except queue.Empty:
            return messages


def test_the_server_may_be_killed(folder):
    ahead()
    kernel = Kernel()
    (server,) = kernels.status()
    kill(server["pid"])
    assert kernel.run("'alive'") == "'alive'"
    assert kernel.manager.is_alive()
    pid = kernel.pid
    kernel.manager.restart_kernel()
    kernel.client.wait_for_ready(60)
    assert kernel.run("'again'") == "'again'" and kernel.how in ("pool", "forked")
    until(lambda: not is_alive(pid))
    kernel.close()


OWNER = """
import sys, time
from mlnb.notebooks import kernels
kernels.SERVER_TIMEOUT = kernels.LOADING_TIMEOUT = 120
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="mlnb")
manager.start_kernel(independent={})
client = manager.client()
client.start_channels()
client.wait_for_ready(60)
print(manager.provisioner.how, manager.provisioner.pid, flush=True)
time.sleep(600)
"""


def owner(independent=False):
    "A process that owns a kernel: the process, the kernel's id"
    process = subprocess.Popen([sys.executable, "-c", OWNER.format(independent)], stdout=subprocess.PIPE, text=True)
    how, pid = process.stdout.readline().split()
    assert how in ("pool", "forked")
    return process, int(pid)


@pytest.mark.parametrize("pool", ["0", "1"])
def test_a_killed_owner_leaves_no_kernel(folder, monkeypatch, pool):
    monkeypatch.setenv("MLNB_KERNEL_POOL", pool)
    if pool == "1":
        ahead()
    process, pid = owner()
    assert is_alive(pid)
    process.kill()
    process.communicate()
    until(lambda: not is_alive(pid))
    until(lambda: not [p for p in folder.iterdir() if p.is_dir() and p.name.startswith("k")])


@pytest.mark.parametrize("pool", ["0", "1"])
def test_nor_does_one_whose_server_was_killed_before(folder, monkeypatch, pool):
    monkeypatch.setenv("MLNB_KERNEL_POOL", pool)
    if pool == "1":
        ahead()
    process, pid = owner()
    (server,) = kernels.status()
    kill(server["pid"])
    time.sleep(0.3)
    assert is_alive(pid)
    process.kill()
    process.communicate()
    until(lambda: not is_alive(pid))


def test_an_independent_kernel_lives_on(folder):
    process, pid = owner(independent=True)
    process.kill()
    process.wait()
    process.stdout.close()
    time.sleep(0.5)
    assert is_alive(pid)
    kill(pid)
    until(lambda: not is_alive(pid))


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        ({"stdout": subprocess.PIPE}, "its output goes to a pipe"),
        ({"pass_fds": ()}, "it was started with the options pass_fds"),
        ({"env": {**os.environ, "PYTHONPATH": "src"}}, "PYTHONPATH has a relative folder"),
    ],
)
def test_doubt_is_a_cold_start_with_one_line(folder, caplog, launch, reason):
    caplog.set_level(logging.INFO, "mlnb.kernels")
    kernel = Kernel(**launch)
    assert kernel.how == "cold"
    assert [r.getMessage() for r in caplog.records if r.name == "mlnb.kernels"] == [
        f"kernel mlnb starts cold: {reason}"
    ]
    assert kernel.run("6 * 7") == "42"
    kernel.close()


def test_another_interpreter_is_left_to_itself(folder, tmp_path, monkeypatch, caplog):
    spec = json.loads(
        Path(__file__).parent.parent.joinpath("jupyter", "share", "kernels", "mlnb", "kernel.json").read_text()
    )
    program = tmp_path / "python-of-another"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    path = tmp_path / "kernels" / "other"
    path.mkdir(parents=True)
    (path / "kernel.json").write_text(json.dumps(spec | {"argv": [str(program), *spec["argv"][1:]]}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    kernel = Kernel("other")
    assert kernel.how == "cold" and kernel.run("6 * 7") == "42"
    assert f"kernel other starts cold: its interpreter is ['{program}']" in caplog.text
    kernel.close()


def test_a_manager_that_chose_its_transport_keeps_it(folder):
    manager = KernelManager(kernel_name="mlnb", shell_port=0, transport_encryption="auto")
    manager.start_kernel()
    assert manager.transport == "tcp" and manager.provisioner.how == "forked"
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(60)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def notebook(*cells):
    "A notebook of code cells"
    spec = {"name": "mlnb", "display_name": "Python (mlnb)", "language": "python"}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": spec})


def test_nbclient(how, tmp_path):
    from nbclient import NotebookClient

    node = notebook("import os", "os.getcwd()", "print('said')")
    client = NotebookClient(node, kernel_name="mlnb", resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        assert client.km.provisioner.how == how
    client.execute()
    assert node.cells[1].outputs[0]["data"]["text/plain"] == repr(str(tmp_path))
    assert node.cells[2].outputs[0]["text"] == "said\n"


def test_papermill(how, tmp_path):
    import papermill

    node = notebook("x = 1", "print(x + 1)")
    node.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(node, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"x": 41}, kernel_name="mlnb", progress_bar=False
    )
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0]["text"] == "42\n"


def test_the_manager_of_jupyter_server(how, tmp_path):
    from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager

    async def live():
        manager = AsyncMappingKernelManager(root_dir=str(tmp_path), default_kernel_name="mlnb")
        kernel_id = await manager.start_kernel(path="")
        kernel = manager.get_kernel(kernel_id)
        await asyncio.wait_for(kernel.ready, 60)
        assert kernel.provisioner.how == how
        client = kernel.client()
        client.start_channels()
        await client.wait_for_ready(60)
        reply = await client.execute_interactive("import os; print(os.getcwd())", timeout=60, output_hook=hear)
        assert reply["content"]["status"] == "ok"
        await manager.restart_kernel(kernel_id)
        await client.wait_for_ready(60)
        await client.execute_interactive("print('again')", timeout=60, output_hook=hear)
        client.stop_channels()
        await manager.shutdown_all()

    texts, hear = [], lambda message: texts.append(message["content"].get("text"))
    asyncio.run(live())
    assert f"{tmp_path}\n" in texts and "again\n" in texts


def test_the_plain_command_of_the_kernelspec_starts_a_kernel(folder):
    "The kernelspec without its provisioner is one of any other Python"
    spec = json.loads(
        Path(__file__).parent.parent.joinpath("jupyter", "share", "kernels", "mlnb", "kernel.json").read_text()
    )
    assert spec["argv"] == ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    assert spec["metadata"]["debugger"] is True


def test_eight_idle_kernels_share_their_memory(folder, monkeypatch):
    monkeypatch.delenv("MLNB_KERNEL_PRELOAD")
    monkeypatch.setenv("MLNB_KERNEL_POOL", "1")
    ahead()
    running = [Kernel() for _ in range(8)]
    for kernel in running:
        kernel.run("import numpy, pandas, pyarrow, torch, matplotlib.pyplot")
    sizes = [forkserver.memory(k.pid)["uss"] for k in running]
    for kernel in running:
        kernel.close(now=True)
    assert {k.how for k in running} <= {"pool", "forked"}
    assert max(sizes) <= 60e6, sizes


def test_other_signals_reach_the_kernel(kernel):
    kernel.run("import signal, os; signal.signal(signal.SIGUSR1, lambda *a: open('seen.txt', 'w').close())")
    kernel.manager.signal_kernel(signal.SIGUSR1)
    assert until(lambda: kernel.run("os.path.exists('seen.txt')") == "True")


def test_a_manager_in_a_process_that_ignores_interrupts(folder):
    "A shell that starts a program in the background makes it ignore Ctrl-C; its kernels must not"
    code = """
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from mlnb.notebooks import kernels
        kernels.SERVER_TIMEOUT = kernels.LOADING_TIMEOUT = 120
        worker = kernels.fork_worker("builtins:repr")
        print(worker.how, worker.wait(60))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "forked 0\n", done.stderr
    kernel = Kernel()
    interrupt(kernel)
    kernel.close()
