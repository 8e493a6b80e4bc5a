"""Pipelines against `ploomber build`, on generated projects, each command a process of its own from start to end.

Both run the same 30 notebooks, each of which imports pandas and torch: in a chain, and side by side on two jobs.
Beyond the cells' own time is what is left once the time is taken off that the same cells take in one process that has
imported both. Kernels are warm: the process that holds the libraries ready has been started by a run that does not
count.

Both are asked about the same project when nothing has changed. Before the clock counts for anything, both must say
that nothing is to do. The times of a plan after one function of 200 has changed, and of 1,000 tasks that nobody has
planned before, have no peer: Ploomber does not see the function, and hashes no inputs. The time of a run of many
trivial tasks is compared with that of a quarter of them.
"""

import needs

needs.packages()

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import generated
from report import arguments, at_most, faster, finish

ROUNDS = 5
TASKS = 50
PROGRAMS = Path(sys.executable).parent
UP_TO_DATE = """
from ploomber.spec import DAGSpec
dag = DAGSpec("pipeline.yaml").to_dag().render()
for name in dag:
    task = dag[name]
    parameters = task.params.to_json_serializable(params_only=True)
    task.product.metadata.update(source_code=str(task.source), params=parameters)
"""


def timed(command: list[str], root: Path) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed."""
    quiet = {**os.environ, "PLOOMBER_STATS_ENABLED": "false", "MLNB_TRACK_RUNS": "false"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=quiet)
    elapsed = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return elapsed, done.stdout


def plan(root: Path) -> tuple[float, list[dict]]:
    """Seconds of `mlnb plan`, and its tasks."""
    elapsed, text = timed([str(PROGRAMS / "mlnb"), "plan", "--json"], root)
    return elapsed, json.loads(text)["tasks"]


def outdated(tasks: list[dict]) -> list[str]:
    return [t["name"] for t in tasks if t["state"] == "outdated"]


def ploomber_build(root: Path) -> float:
    """Seconds of `ploomber build` when nothing is to do."""
    elapsed, text = timed([str(PROGRAMS / "ploomber"), "build"], root)
    if "True" in text:
        sys.exit(f"ploomber build ran tasks:\n{text}")
    return elapsed


def own_time(root: Path) -> float:
    """Seconds of all cells of a project, one after the other, in a process that has imported what they import."""
    script = """
import json, os, pathlib, sys, time
import pandas, torch, yaml
sys.path.insert(0, "")
codes = []
for task in yaml.safe_load(open("pipeline.yaml"))["tasks"]:
    cells = json.load(open(task["source"]))["cells"]
    data = task["product"]["data"]
    given = f"product = {{'data': {data!r}}}\\n"
    given += "upstream = upstream and {upstream[0]: {'data': f'out/{upstream[0]}.txt'}}"
    codes.append([compile("".join(c["source"]), "cell", "exec") for c in cells[:1]] + [compile(given, "given", "exec")]
                 + [compile("".join(c["source"]), "cell", "exec") for c in cells[1:]])
os.makedirs("out", exist_ok=True)
begin = time.perf_counter()
for code in codes:
    names = {}
    for cell in code:
        exec(cell, names)
print(time.perf_counter() - begin)
"""
    elapsed = [float(timed([sys.executable, "-c", script], root)[1]) for _ in range(ROUNDS)]
    shutil.rmtree(root / "out")
    return statistics.median(elapsed)


def mlnb_run(root: Path, *words: str) -> float:
    """Seconds of `mlnb run` from nothing; every task must have been executed."""
    for folder_name in ("out", ".mlnb"):
        shutil.rmtree(root / folder_name, ignore_errors=True)
    elapsed, text = timed([str(PROGRAMS / "mlnb"), "run", "--json", *words], root)
    assert {t["status"] for t in json.loads(text)["tasks"]} == {"executed"}
    return elapsed


def ploomber_run(root: Path) -> float:
    """Seconds of `ploomber build` from nothing."""
    shutil.rmtree(root / "out", ignore_errors=True)
    elapsed, text = timed([str(PROGRAMS / "ploomber"), "build"], root)
    assert "False" not in text, text
    return elapsed


def notebooks(folder: Path, chain: bool, count: int = 30) -> list[dict]:
    """A chain, or side by side on two jobs, against Ploomber serial or parallel."""
    root = generated.make(folder / f"notebooks{chain}", count, chain=chain, imports=("pandas", "torch"))
    cell_seconds = own_time(root)
    ours = statistics.median(mlnb_run(root, "--jobs", "1" if chain else "2") for _ in range(ROUNDS)) - cell_seconds
    if not chain:
        text = (
            "executor: {dotted_path: ploomber.executors.Parallel, processes: 2}\n"
            + (root / "pipeline.yaml").read_text()
        )
        (root / "pipeline.yaml").write_text(text)
    peer = statistics.median(ploomber_run(root) for _ in range(ROUNDS)) - cell_seconds
    how = "in a chain" if chain else "side by side, 2 jobs"
    name = f"{count} notebooks that import pandas and torch, {how}, beyond cell time, s, against ploomber build"
    return [faster(name, ours, peer, 20)]


def many_runs(folder: Path) -> list[dict]:
    """1,000 trivial tasks against 250, and the memory of the process that runs them."""
    elapsed = {n: mlnb_run(generated.make(folder / f"run{n}", n, chain=False), "--jobs", "2") for n in (250, 1000)}
    root = generated.make(folder / "memory", 1000, chain=False)
    script = "import resource, sys; from mlnb.cli.main import cli; "
    script += "sys.argv = ['mlnb', 'run', '--json', '--jobs', '2']\ntry: cli()\n"
    script += "except SystemExit: print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    peak = float(timed([sys.executable, "-c", script], root)[1].rsplit("PEAK", 1)[1])
    name = "run of 1,000 trivial tasks against 4 runs of 250: it grows linearly, s"
    return [
        faster(name, elapsed[1000], 4 * elapsed[250], 0.75),
        at_most("run of 1,000 tasks, memory of mlnb run, MB", peak, 500, "MB"),
    ]


def nothing_changed(folder: Path) -> list[dict]:
    root = generated.make(folder / "nothing", TASKS)
    generated.complete(root)
    subprocess.run([sys.executable, "-c", UP_TO_DATE], cwd=root, check=True, capture_output=True)
    assert not outdated(plan(root)[1])
    ploomber_build(root)
    ours, peer = (
        statistics.median(column)
        for column in zip(*((plan(root)[0], ploomber_build(root)) for _ in range(ROUNDS)), strict=True)
    )
    name = f"nothing changed, {TASKS} tasks, whole process, s"
    return [faster(f"{name}, against ploomber build", ours, peer, 20), at_most(name, ours, 0.2, "s")]


def one_function_changed(folder: Path) -> list[dict]:
    """Each round changes another function; just the tasks that use it, or a function that calls it, may be outdated."""
    root = generated.make(folder / "one", TASKS, chain=False, functions=4 * TASKS)
    generated.complete(root)
    module, elapsed = root / generated.PACKAGE / "work.py", []
    for n in range(ROUNDS):
        before, changed = module.read_text(), 10 * n + 83
        module.write_text(before.replace(f" + {changed}\n", f" + {changed + 1000}\n"))
        callers = range(changed, 4 * TASKS, 10)  # the next in its column, and so on
        seconds, tasks = plan(root)
        elapsed.append(seconds)
        assert outdated(tasks) == sorted({f"t{f // 4:04}" for f in callers}), outdated(tasks)
        module.write_text(before)
        plan(root)
    return [
        at_most(
            f"one function changed of {4 * TASKS}, {TASKS} tasks, whole mlnb plan, s",
            statistics.median(elapsed),
            0.5,
            "s",
        )
    ]


def many_tasks(folder: Path) -> list[dict]:
    """Cold: nothing of an earlier plan is left."""
    elapsed = {}
    for n in (250, 1000):
        root = generated.make(folder / f"many{n}", n)
        elapsed[n] = statistics.median(
            plan(root)[0] for _ in range(ROUNDS) if not subprocess.run(["rm", "-rf", root / ".mlnb"]).returncode
        )
    return [
        at_most("plan of 1,000 tasks, cold, whole process, s", elapsed[1000], 2, "s"),
        faster(
            "plan of 1,000 tasks against 4 plans of 250: it grows linearly, s", elapsed[1000], 4 * elapsed[250], 0.75
        ),
    ]


BENCHMARKS = {
    "nothing": nothing_changed,
    "one": one_function_changed,
    "plan": many_tasks,
    "chain": partial(notebooks, chain=True),
    "side": partial(notebooks, chain=False),
    "many": many_runs,
}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="measure this part; default: all of them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            row
            for name, measure in BENCHMARKS.items()
            if name in (options.only or BENCHMARKS)
            for row in measure(Path(folder))
        ]
    finish(results, options.json)


if __name__ == "__main__":
    main()
