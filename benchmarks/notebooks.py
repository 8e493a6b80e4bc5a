"""A notebook against papermill's API, and kernel `mlnb` against `python3`.

A notebook imports pandas and torch and makes a table. Beyond its cells' own time is what is left of the whole call
once the time is taken off that the same cells take in a process that has imported both: `execute` against papermill's
`execute_notebook`, each called again and again in one process.

Kernels run under jupyter_client's own manager, `mlnb` forked from a process that has imported the libraries,
`python3` started by Jupyter. The time is from the request for a kernel to the answer of its first cell. Memory is
what belongs to one process alone, with the same libraries imported. All times are medians.
"""

import needs

needs.packages()

import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import pandas
import torch
from jupyter_client.manager import KernelManager
from report import arguments, at_most, faster, finish, median_seconds, row

from mlnb.notebooks import kernels
from mlnb.notebooks.execute import execute
from mlnb.notebooks.forkserver import memory

IMPORTS = "import numpy, pandas, pyarrow, torch, matplotlib.pyplot"
MEGABYTES = 60  # that an idle kernel may have for itself


@contextlib.contextmanager
def server(pool: int):
    """A fork server of our own that has imported everything."""
    folder = tempfile.mkdtemp(prefix="mlnb-")
    os.environ.update(MLNB_RUNTIME_DIR=folder, MLNB_KERNEL_POOL=str(pool))
    try:
        worker = kernels.fork_worker("builtins:repr")
        worker.wait()
        worker.close()
        wait_ready(pool)
        yield
        kernels.stop(kill=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_ready(pool: int):
    """Wait until the server has imported everything and has as many kernels ahead as it should."""
    while True:
        servers = kernels.status()
        ready = sum(child["ready"] for s in servers for child in s.get("children", []) if child["kind"] == "pool")
        if servers and not servers[0].get("waiting", True) and ready >= pool:
            return
        time.sleep(0.1)


def start(name: str, code: str) -> tuple[float, KernelManager]:
    """Seconds until a new kernel has answered `code`, and the kernel."""
    begin = time.perf_counter()
    manager = KernelManager(kernel_name=name)
    with open(os.devnull, "w") as nowhere:
        manager.start_kernel(stderr=nowhere)
    client = manager.client()
    client.start_channels(hb=False)
    client.execute(code)
    reply = client.get_shell_msg(timeout=120)
    elapsed = time.perf_counter() - begin
    assert reply["content"]["status"] == "ok", reply["content"]
    client.stop_channels()
    return elapsed, manager


def seconds(name: str, code: str, times: int, pool: int = 0) -> float:
    """The median time until the first answer."""
    elapsed = []
    for _ in range(times):
        wait_ready(pool)
        first_answer, manager = start(name, code)
        assert name != "mlnb" or manager.provisioner.how == ("pool" if pool else "forked"), manager.provisioner.how
        manager.shutdown_kernel(now=True)
        elapsed.append(first_answer)
    return statistics.median(elapsed)


def launch(title: str, code: str, bar: float, times: int, pool: int) -> dict:
    """One row: launch to first answer of both kernels."""
    with server(pool):
        ours, peer = seconds("mlnb", code, 2 * times + 1, pool), seconds("python3", code, times)
    return faster(title, ours, peer, bar)


CELLS = [
    "import pandas as pd\nimport torch\nrows = 3",
    "pd.DataFrame({'a': range(rows)}).a.sum(), torch.ones(rows).sum()",
]


def write(path: Path) -> Path:
    """The notebook."""
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [{**empty, "id": f"c{i}", "source": source} for i, source in enumerate(CELLS)]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def call_seconds(times: int, work) -> float:
    """Seconds of a call by the clock, after one that does not count."""
    work()
    return median_seconds(work, times, time.perf_counter)


def own_time(times: int) -> float:
    """What the cells take where both libraries are imported already."""
    code = [compile(cell, "cell", "exec") for cell in CELLS]
    return call_seconds(times, lambda: [exec(c, {"rows": 3, "pd": pandas, "torch": torch}) for c in code])


def whole_notebook(times: int) -> list[dict]:
    """Two rows: the notebook against papermill, and the time alone."""
    import papermill

    with server(1), tempfile.TemporaryDirectory() as folder:
        path, out, cell_seconds = write(Path(folder, "task.ipynb")), Path(folder, "out.ipynb"), own_time(times)
        ours = call_seconds(4 * times, lambda: execute(path, out)) - cell_seconds
        run_papermill = lambda: papermill.execute_notebook(str(path), str(out), progress_bar=False)
        peer = call_seconds(times, run_papermill) - cell_seconds
    name = "notebook that imports pandas and torch, beyond its cells' own time, s"
    return [faster(f"{name}, against papermill", ours, peer, 20), at_most(name, ours, 0.1, "s")]


def idle(count: int) -> dict:
    """One row: the largest own memory of `count` idle kernels, and that of one that was started cold."""
    with server(1):
        running = [start("mlnb", IMPORTS)[1] for _ in range(count)]
        cold = start("python3", IMPORTS)[1]
        ours = max(memory(m.provisioner.pid)["uss"] for m in running) / 1e6
        peer = memory(cold.provisioner.pid)["uss"] / 1e6
        for manager in [*running, cold]:
            manager.shutdown_kernel(now=True)
    name = f"own memory of each of {count} idle kernels, MB, at most {MEGABYTES}"
    return row(name, ours, None, ours <= MEGABYTES, peer, peer / ours)


def main():
    """Measure, print, and exit with 1 if a bar does not hold."""
    options = arguments(__doc__)
    options.add_argument("--times", type=int, default=5, help="runs of the peer, of which the median counts")
    chosen = options.parse_args()
    times = chosen.times
    rows = [
        *whole_notebook(times),
        launch("kernel made ahead, launch to first answer, s, against python3", "1 + 1", 5, times, 1),
        launch("kernel forked on demand, launch to first answer, s, against python3", "1 + 1", 2, times, 0),
        launch(
            "kernel made ahead, launch to pandas and torch imported, s, against python3",
            "import pandas, torch",
            20,
            times,
            1,
        ),
        idle(8),
    ]
    finish(rows, chosen.json)


if __name__ == "__main__":
    main()
