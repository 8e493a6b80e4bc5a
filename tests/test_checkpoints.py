"""Copies of running kernels, from which a notebook that failed goes on: real kernels, real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_project import notebook
from waiting import is_alive, until

from mlnb.notebooks import checkpoints, forkserver, kernel_snapshots, worker
from mlnb.notebooks.execute import execute
from mlnb.project.errors import NotebookError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies of a kernel need Linux")

SLOW = "open('count', 'a').write('x')\nimport time; time.sleep(1.2)"  # longer than PERIOD


class Task:
    "A notebook in a folder of its own, executed with checkpoints"

    def __init__(self, folder):
        self.folder, self.path, self.kernel_snapshots = folder, folder / "task.ipynb", folder / "copies"
        (folder / "stage").mkdir()

    def write(self, *sources):
        notebook(self.path, None, *sources)
        return self

    def run(self, output="out.ipynb", **options):
        "The code cells of the executed copy"
        log = self.folder / "out.log"
        settings = {"folder": str(self.kernel_snapshots), "watched": [str(self.folder / "stage")]}
        options = {"checkpoints": settings} | options
        with pytest.MonkeyPatch.context() as patch:
            # ipykernel does not forward low-level output where it finds this variable
            patch.delenv("PYTEST_CURRENT_TEST", raising=False)
            execute(self.path, self.folder / output, cwd=self.folder, log=log, **options)
        return [c for c in json.loads((self.folder / output).read_text())["cells"] if c["cell_type"] == "code"]

    def fail(self, **options):
        "The error of an execution that fails"
        with pytest.raises(NotebookError) as failed:
            self.run(**options)
        return failed.value

    def count(self):
        "How often the slow cell has run"
        return len((self.folder / "count").read_text())


@pytest.fixture
def task(tmp_path):
    made = Task(tmp_path)
    yield made
    checkpoints.release_all(made.kernel_snapshots)


def shown(cells):
    "What cells show that a second run must show as well"
    return [
        (c["execution_count"], [o.get("text") or (o.get("data") or {}).get("text/plain") for o in c["outputs"]])
        for c in cells
    ]


def test_a_mended_notebook_goes_on(task):
    seeds = "import random, numpy as np\nrandom.seed(1); rng = np.random.default_rng(2); np.random.seed(3)"
    numbers = "print(random.random(), rng.random(), np.random.rand())"
    first, last = (seeds, SLOW, numbers), (numbers, "In[2][:4]", "len(Out)")
    failed = task.write(*first, "1 / 0", *last).fail()
    saved = failed.checkpoint
    assert saved, failed.why_not
    assert (
        "ZeroDivisionError" in str(failed)
        and saved["cell"] == saved["done"] == 2
        and is_alive(saved["pid"])
        and failed.why_not is None
    )
    assert json.loads(json.dumps(saved)) == saved
    task.write(*first, "mended = 1", *last)
    assert checkpoints.check_resumable(saved, task.path) == ""
    began = []
    cells = task.run(resume=saved, on_cell=lambda k, n: began.append((k, n)))
    assert task.count() == 1 and began == [(3, 7), (4, 7), (5, 7), (6, 7), (7, 7)]
    assert not any(c["metadata"]["papermill"]["exception"] for c in cells)
    undisturbed = task.run("undisturbed.ipynb", checkpoints=None)
    assert task.count() == 2 and shown(cells) == shown(undisturbed)
    assert list(task.kernel_snapshots.iterdir()) == [] and not is_alive(saved["pid"])
    log = task.folder / "out.log"
    assert not log.exists() or "timed out" not in log.read_text(), "it ends at once"


def test_it_can_fail_again_and_go_on_again(task):
    before = ("n = 1", SLOW, "n += 1")
    saved = task.write(*before, "1 / 0", "n").fail().checkpoint
    again = task.write(*before, "[][1]", "n").fail(resume=saved).checkpoint
    assert again["pid"] != saved["pid"] and again["done"] == saved["done"] and until(lambda: not is_alive(saved["pid"]))
    cells = task.write(*before, "n += 1", "n").run(resume=again)
    assert cells[-1]["outputs"][0]["data"]["text/plain"] == ["3"] and task.count() == 1


def test_what_a_notebook_uses(task):
    setup = (
        "import logging, sys, os, pickle\nlogging.basicConfig(level='INFO', stream=sys.stdout, format='%(message)s')\n"
        "import pandas as pd, numpy as np, matplotlib.pyplot as plt\n"
        "offset = 1\ndef f(x): return x + offset\nclass A: pass\na = A()\n"
        "open('rows.txt', 'w').write('1\\n2\\n3\\n')\nrows = open('rows.txt', buffering=1)\n"
        "os.environ['MINE'] = '1'; os.makedirs('below', exist_ok=True); os.chdir('below')\nold = sys.stdout"
    )
    slow = (
        "frame = pd.DataFrame({'a': np.arange(300_000)}); frame.to_parquet('t.parquet'); pd.read_parquet('t.parquet')\n"
        + SLOW
    )
    uses = (
        "offset = 10\nf(1), pickle.loads(pickle.dumps(a)).__class__ is A, os.environ['MINE'], "
        "os.path.basename(os.getcwd())",
        "print('one'); logging.info('two'); print('three', file=old); os.system('echo four'); time.sleep(0.5)",
        "plt.plot([1, 2]);",
        "pd.read_parquet('t.parquet').a.sum(), (np.ones((800, 800)) @ np.ones((800, 800))).sum()",
        "rows.readline(), len(os.listdir('/proc/self/task')) > 1",
        "from IPython.display import display\nh = display('a', display_id=True); h.update('b')",
        "%%time\nx = 1",
        "!echo shell",
    )
    saved = task.write(setup, slow, "rows.readline()", "1 / 0", *uses).fail().checkpoint
    cells = task.write(setup, slow, "rows.readline()", "0", *uses).run(resume=saved)
    text = ["".join("".join(o.get("text") or o["data"]["text/plain"]) for o in c["outputs"]) for c in cells]
    assert text[4] == "(11, True, '1', 'below')"
    assert (
        text[5].split()[:3] == ["one", "two", "three"] and "four" in text[5] + text[6]
    )  # what a program prints comes when it comes
    assert any("image/png" in o.get("data", {}) for o in cells[6]["outputs"])
    assert text[7] == "(np.int64(44999850000), np.float64(512000000.0))"
    assert (text[2], text[8]) == (r"'1\n'", r"('2\n', True)")
    assert text[9] == "'b'" and "Wall time" in text[10] and text[11].strip() == "shell"


def test_a_fast_notebook_takes_no_copy(task, monkeypatch):
    monkeypatch.setattr(checkpoints, "MIN_CELL_SECONDS", 60)
    failed = task.write("a = 1", "b = 2", "1 / 0").fail()
    assert failed.checkpoint is None and failed.why_not == "no cells before it took a second together"
    assert not task.kernel_snapshots.exists()


def test_an_early_end_leaves_nothing(task):
    task.write(SLOW, "raise SystemExit").run()
    assert list(task.kernel_snapshots.iterdir()) == []


def test_success_leaves_nothing(task):
    cells = task.write(SLOW, f"import os\nprint([n for n in os.listdir({str(task.kernel_snapshots)!r})])").run()
    names = "".join(cells[-1]["outputs"][0]["text"])
    assert ".copy" in names and list(task.kernel_snapshots.iterdir()) == []


@pytest.mark.long
def test_threads_of_libraries_come_back(task):
    setup = (
        "import os, numpy as np, torch\nfrom sklearn.ensemble import HistGradientBoostingRegressor\n"
        "torch.manual_seed(0); torch.set_num_threads(3); x = torch.rand(600, 600)\n"
        "rng = np.random.default_rng(0); a = rng.random((2000, 5))\n"
        "def threads(): return set(os.listdir('/proc/self/task'))\n"
        "def work():\n"
        "    before = threads(); product = (x @ x).sum(); begun = threads() - before\n"  # others may end meanwhile
        "    fitted = HistGradientBoostingRegressor(max_iter=5, random_state=0).fit(a, a[:, 0] * a[:, "
        "1]).predict(a).sum()\n"
        "    return len(begun), float(product), float(fitted), float((a.T @ a).sum())\n"
        "first = work()\nimport pyarrow as pa, pyarrow.compute as pc, pyarrow.csv\n"
        "table = pa.table({'k': [i % 7 for i in range(100_000)], 'v': range(100_000)})\n"
        "pyarrow.csv.write_csv(table, 't.csv')\n"
        "def arrow(): return pyarrow.csv.read_csv('t.csv').group_by('k', use_threads=True).aggregate([('v', "
        "'sum')]).sort_by('k')\n"
        "grouped = arrow()"
    )
    saved = task.write(setup, SLOW, "1 / 0").fail().checkpoint
    later = (
        "again = work()\nagain[1:] == first[1:], again[0] >= 2",
        "work()[1:] == first[1:], arrow().equals(grouped)",
    )
    cells = task.write(setup, SLOW, *later).run(resume=saved)
    assert [c["outputs"][0]["data"]["text/plain"] for c in cells[-2:]] == [["(True, True)"], ["(True, True)"]]


def take_in(task, *states):
    "What `take` says in each of the states that code makes, and that other code ends"
    setup = (
        "import os, sys\nfrom mlnb.notebooks import kernel_snapshots\n"
        "def take():\n    print(kernel_snapshots.take_snapshot('copies', 7, 60))"
    )
    cells = task.write(setup, *(f"{begin}\ntake()\n{end}" for begin, end in states)).run(checkpoints=None)
    return ["".join(c["outputs"][0]["text"]) for c in cells[1:]]


WHY_NOT = {
    "a thread is still running: mine": (
        "import threading\nstop = threading.Event(); t = threading.Thread(target=stop.wait, name='mine'); t.start()",
        "stop.set(); t.join()",
    ),
    "child processes run: ": ("import subprocess\np = subprocess.Popen(['sleep', '60'])", "p.kill(); p.wait()"),
    "a GPU is in use": (
        "import torch\nreal = torch.cuda.is_initialized\ntorch.cuda.is_initialized = lambda: True",
        "torch.cuda.is_initialized = real",
    ),
    "a coroutine is still running": (
        "import asyncio\nasync def mine(): await asyncio.sleep(60)\nt = asyncio.create_task(mine())",
        "t.cancel(); await asyncio.sleep(0)",
    ),
    "a temporary folder is removed when the kernel ends": (
        "import tempfile\nd = tempfile.TemporaryDirectory()", "d.cleanup()"
    ),
    "memory is short: 1 MiB are left": (
        "real = kernel_snapshots.available_memory\nkernel_snapshots.available_memory = lambda: 1 << 20",
        "kernel_snapshots.available_memory = real",
    ),
    "a file is open for writing: ": ("f = open('written.txt', 'w')", "f.close()"),
    "a file is mapped into memory to be written": (
        "import torch\nm = torch.from_file('mapped', shared=True, size=10)", "del m"
    ),
    "a network connection is open: ": ("import socket\ns = socket.create_server(('127.0.0.1', 0))", "s.close()"),
    "a connection is open: ": ("s = socket.socket(socket.AF_UNIX); s.connect(os.environ['LISTENER'])", "s.close()"),
    "2 threads run Python code and are unknown to threading": (
        "import _thread, time\nlock = _thread.allocate_lock(); lock.acquire()\n"
        "def wait():\n    with lock: pass\nfor _ in range(2): _thread.start_new_thread(wait, ())",
        "lock.release()\nwhile kernel_snapshots._hidden_threads(): time.sleep(0.01)",
    ),
    "threads of libraries run that may not survive a fork": (
        "import ctypes, pyarrow\nbefore, library = len(kernel_snapshots._native_threads()), ctypes.CDLL(None)\n"
        "numbers = (ctypes.c_ulong * 4)()\n"  # one more than Arrow's
        "for i in range(4): library.pthread_create(ctypes.byref(numbers, i * 8), None, library.pause, None)",
        "for number in numbers: library.pthread_cancel(ctypes.c_ulong(number))\n"
        "while len(kernel_snapshots._native_threads()) > before: time.sleep(0.01)",
    ),
    "copies of a kernel need Linux": ("sys.platform = 'darwin'", "sys.platform = 'linux'"),
}  # fmt: skip


def test_why_not(task, monkeypatch):
    with (
        socket.socket(socket.AF_UNIX) as listener,
        forkserver.short_socket_path(str(task.folder / "listener")) as path,
    ):
        listener.bind(path)
        listener.listen()
        monkeypatch.setenv("LISTENER", path.replace("self", str(os.getpid())))
        answers = take_in(task, *WHY_NOT.values(), ("", ""))
    for sentence, answer in zip(WHY_NOT, answers, strict=False):
        assert "why_not" in answer and sentence in answer
    assert "'cell': 7" in answers[-1]  # every state has ended


def test_it_is_not_a_kernel(tmp_path):
    assert kernel_snapshots.take_snapshot(str(tmp_path), 0) == {"why_not": "this is not ipykernel"}


def test_the_last_reason_is_told(task):
    failed = task.write("f = open('written.txt', 'w')", SLOW, "1 / 0").fail()
    assert failed.checkpoint is None and failed.why_not == f"a file is open for writing: {task.folder / 'written.txt'}"


def test_a_newer_copy_ends_the_older(task):
    children = "import os\nprint(open(f'/proc/self/task/{os.getpid()}/children').read())"
    failed = task.write(SLOW, children, SLOW, "None", "1 / 0").fail()
    cells = [c for c in json.loads((task.folder / "out.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    older = int("".join(cells[1]["outputs"][0]["text"]))
    assert failed.checkpoint["done"] == 3 and older != failed.checkpoint["pid"] and not is_alive(older)
    assert [p.suffix for p in sorted(task.kernel_snapshots.iterdir())] == [".json", ".copy"]


DEADLY = ["import os; os.kill(os.getpid(), 9)", "import os; os._exit(3)", "while True: pass", "import sys; sys.exit(3)"]


@pytest.mark.parametrize("end", DEADLY)
def test_however_the_kernel_ends(task, end):
    saved = task.write("n = 1", SLOW, end, "n").fail(timeout=5).checkpoint
    cells = task.write("n = 1", SLOW, "n += 1", "n").run(resume=saved)
    assert cells[-1]["outputs"][0]["data"]["text/plain"] == ["2"] and task.count() == 1


def test_a_copy_that_was_killed(task):
    saved = task.write(SLOW, "1 / 0").fail().checkpoint
    os.kill(saved["pid"], signal.SIGKILL)
    assert until(lambda: not is_alive(saved["pid"]))
    assert checkpoints.check_resumable(saved, task.path) == "the copy of the kernel has ended"
    assert "could not be started: RuntimeError: the copy of the kernel has ended" in str(task.fail(resume=saved))


def test_a_copy_does_not_wait_for_ever(task):
    settings = {"folder": str(task.kernel_snapshots), "lifetime": 3}
    saved = task.write(SLOW, "1 / 0").fail(checkpoints=settings).checkpoint
    assert until(lambda: not is_alive(saved["pid"])) and not Path(saved["socket"]).exists()
    assert checkpoints.check_resumable(saved, task.path) == "the copy of the kernel waited long enough and has ended"


def test_discarded(task):
    saved = task.write(SLOW, "1 / 0").fail().checkpoint
    checkpoints.release_all(task.kernel_snapshots)
    assert until(lambda: not is_alive(saved["pid"])) and list(task.kernel_snapshots.iterdir()) == []
    checkpoints.release_all(task.kernel_snapshots / "none")


def test_what_was_changed(task):
    saved = task.write("a = 1  # one", SLOW, "1 / 0").fail().checkpoint
    assert checkpoints.check_resumable(saved, task.write("a = 1", SLOW, "a", "more").path) == ""
    changed = "has changed"
    why_not = checkpoints.check_resumable(saved, task.write("a = 2", SLOW).path)
    assert f"cell 1 of the notebook, which had run before the copy was made, {changed}" in why_not
    assert changed in checkpoints.check_resumable(saved, task.write("0", "a = 1", SLOW, "0").path)
    assert changed in checkpoints.check_resumable(saved, task.write("a = 1").path)
    assert changed in str(task.fail(resume=saved)) and is_alive(saved["pid"])
    Path(saved["saved"]).unlink()
    assert "of the earlier run are missing" in checkpoints.check_resumable(saved, task.path)


def test_parameters_are_injected(task):
    def write(last):
        notebook(task.path, "n = 1", "n", SLOW, last)

    write("1 / 0")
    saved = task.fail(parameters={"n": 5}).checkpoint
    assert (saved["cell"], saved["done"]) == (4, 4)
    write("n + 1")
    assert checkpoints.check_resumable(saved, task.path) == ""
    cells = task.run(parameters={"n": 5}, resume=saved)
    assert cells[-1]["outputs"][0]["data"]["text/plain"] == ["6"] and [c["execution_count"] for c in cells] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_what_was_written(task):
    stage = task.folder / "stage"
    write = "open('stage/{0}.txt', 'w').write('{0}')"
    saved = task.write(write.format("early") + "\n" + SLOW, write.format("late"), "1 / 0").fail().checkpoint
    signatures = checkpoints.read_saved(saved)["looks"]
    assert sorted(p.name for p in stage.iterdir()) == ["early.txt", "late.txt"]
    assert checkpoints.roll_back_files(signatures) == "" and [p.name for p in stage.iterdir()] == ["early.txt"]
    (stage / "early.txt").write_text("other")
    (stage / "new.txt").write_text("")
    assert (
        checkpoints.roll_back_files(signatures) == f"{stage / 'early.txt'} has been changed since"
        and (stage / "new.txt").exists()
    )
    (stage / "early.txt").unlink()
    assert checkpoints.roll_back_files(signatures) == f"{stage / 'early.txt'} has been removed since"


def test_a_worker_tells(task):
    job = {
        "notebook": str(task.path),
        "output": str(task.folder / "out.ipynb"),
        "checkpoints": {"folder": str(task.kernel_snapshots)},
    }
    job |= {"cwd": str(task.folder)}
    ours, theirs = socket.socketpair()
    task.write(SLOW, "1 / 0")
    worker.perform(job, worker.JsonLinesConnection(theirs))
    theirs.shutdown(socket.SHUT_WR)
    *_, last = worker.JsonLinesConnection(ours)
    assert "ZeroDivisionError" in last["error"] and is_alive(last["checkpoint"]["pid"]) and last["why_not"] is None
    theirs.close()
    ours.close()
    task.write(SLOW, "2")
    with socket.socketpair()[0] as nobody:
        worker.perform(job | {"resume": last["checkpoint"]}, worker.JsonLinesConnection(nobody))
    assert task.count() == 1 and until(lambda: not is_alive(last["checkpoint"]["pid"]))
    task.write(SLOW, "1 / 0")
    with socket.socketpair()[0] as nobody:
        worker.perform(job, worker.JsonLinesConnection(nobody))
    assert list(task.kernel_snapshots.iterdir()) == []  # nobody would know of it


def test_a_kernel_ends_with_its_owner(task):
    saved = task.write(SLOW, "1 / 0").fail().checkpoint
    task.write(SLOW, "open('began', 'w').close()\nimport time; time.sleep(600)")
    program = (
        "import json, sys\nfrom mlnb.notebooks.execute import execute\n"
        "execute('task.ipynb', 'out.ipynb', cwd='.', checkpoints={'folder': sys.argv[2]}, "
        "resume=json.loads(sys.argv[1]))"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(saved), str(task.kernel_snapshots)], cwd=task.folder
    )
    assert until((task.folder / "began").exists) and is_alive(saved["pid"])
    owner.kill()
    owner.wait()
    assert until(lambda: not is_alive(saved["pid"]))


def test_a_kernel_that_goes_on_can_be_stopped(task):
    saved = task.write("kept = 2", SLOW, "1 / 0").fail().checkpoint
    late = task.write("kept = 2", SLOW, "import time; time.sleep(600)").fail(resume=saved, timeout=1)
    assert "took longer than 1 seconds" in str(late) and late.checkpoint, late.why_not
    cells = task.write("kept = 2", SLOW, "kept + 1").run(resume=late.checkpoint)
    assert cells[-1]["outputs"][0]["data"]["text/plain"] == ["3"] and task.count() == 1


def test_progress_bars_and_widgets_go_on(task):
    first = (
        "from tqdm import tqdm\nfor _ in tqdm(range(2)): pass",
        "import ipywidgets\nslider = ipywidgets.IntSlider(1)",
        SLOW,
    )
    saved = task.write(*first, "1 / 0").fail().checkpoint
    assert saved
    cells = task.write(*first, "for _ in tqdm(range(3)): pass", "slider.value = 7\nslider", "slider.value").run(
        resume=saved
    )
    assert "3/3" in "".join(cells[3]["outputs"][0]["text"])
    assert "application/vnd.jupyter.widget-view+json" in cells[4]["outputs"][0]["data"]
    assert cells[5]["outputs"][0]["data"]["text/plain"] == ["7"]


def test_a_kernel_on_ports_goes_on(task, monkeypatch):
    monkeypatch.setenv("MLNB_WARM_KERNELS", "false")
    ports = "import ipykernel\nassert '\"tcp\"' in open(ipykernel.get_connection_file()).read()"
    saved = task.write(ports, SLOW, "1 / 0").fail().checkpoint
    cells = task.write(ports, SLOW, "1 + 1").run(resume=saved)
    assert cells[-1]["outputs"][0]["data"]["text/plain"] == ["2"] and task.count() == 1


def test_a_worker_that_was_killed_leaves_copies_that_are_discarded(task):
    task.write(SLOW, "open('began', 'w').close()\nimport time; time.sleep(600)")
    program = "import sys\nfrom mlnb.notebooks.execute import execute\n"
    program += "execute('task.ipynb', 'out.ipynb', cwd='.', checkpoints={'folder': sys.argv[1]})"
    owner = subprocess.Popen([sys.executable, "-c", program, str(task.kernel_snapshots)], cwd=task.folder)
    assert until((task.folder / "began").exists) and (left := list(task.kernel_snapshots.glob("*.copy")))
    owner.kill()
    owner.wait()
    checkpoints.release_all(task.kernel_snapshots)
    assert left and list(task.kernel_snapshots.iterdir()) == []
