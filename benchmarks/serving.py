"""The service against FastAPI, BentoML, LitServe, MLServer and `mlflow models serve`: the same small network, rows
and load.

Every server is one process or one worker, on one core; the load comes from `wrk` on another (where there are two, and
`taskset`). Ours has everything on: validation, keys, log, split, metrics; the peers have nothing on, and are set up
as their own documentation advises. Before the clock counts for anything, each must answer some rows with the
probabilities of the network. Both of a comparison run at once and take turns under load; a figure is the median of
the rounds. A request holds one row, unless said. CPU seconds are those of all processes of a server. Peers that are
not installed are passed over: `make bench-peers` installs them.
"""

import needs

needs.packages()

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import servers
from report import arguments, at_least, at_most, finish, no_more_than
from servers import LOAD_CORE, Running, Server, pinned, running
from speed.mlp import NAMES, Mlp, requests

CONNECTIONS = 16
ROWS = 1000  # of a request that holds many
RATE = 500  # requests a second, at least, while versions are swapped


@dataclass(frozen=True)
class Bench:
    """Where and how long it is measured."""

    root: Path  # of the project that is served
    seconds: int  # of load, each time
    rounds: int
    requests: int  # of the long run


@dataclass(frozen=True)
class Load:
    """What is sent to a server."""

    to: Running
    path: str
    bodies: Path
    each: str = "lines"  # of the file is a body; else "whole"
    headers: dict | None = None  # default: the server's
    connections: int = CONNECTIONS
    pause: int = 0  # ms of each connection between an answer and its next request

    def run(self, seconds: int) -> dict:
        """Requests, seconds, errors, p50 and p99 (ms) and CPU seconds of the server; an answer that is not 2xx ends
        the program."""
        headers = [f"{k}: {v}" for k, v in (self.headers or self.to.server.headers).items()]
        form = [
            "--threads",
            "1",
            "--connections",
            str(self.connections),
            "--duration",
            f"{seconds}s",
            "--timeout",
            "10s",
        ]
        script = ["--script", str(servers.BENCHMARK_FOLDER / "load.lua"), self.to.url + self.path, "--"]
        what = [str(self.bodies), self.each, str(self.pause), *headers]
        before = self.to.cpu()
        done = subprocess.run([*pinned(LOAD_CORE), "wrk", *form, *script, *what], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"wrk failed: {done.stdout}{done.stderr}")
        results = json.loads(done.stdout.splitlines()[-1])
        if results["errors"] or not results["requests"]:
            sys.exit(
                f"{self.to.server.name} answered {results['requests']} requests, {results['errors']} of them "
                f"with errors"
            )
        return results | {"rate": results["requests"] / results["seconds"], "cpu": self.to.cpu() - before}


def one_row(bench: Bench, to: Running) -> Load:
    """A thousand requests of one row each, in turn, after a few that must be answered rightly."""
    rows = requests(ROWS)
    expected = Mlp.load(bench.root / "products/v1/model").probability(
        np.array([[row[n] for n in NAMES] for row in rows[:5]])
    )
    answered = [to.probability(row) for row in rows[:5]]
    if not np.allclose(answered, expected, atol=1e-6):
        sys.exit(f"{to.server.name} answers {answered}, the model gives {expected.tolist()}")
    bodies = to.server.folder / f"{to.process.pid}.jsonl"
    bodies.write_text("".join(json.dumps(to.server.to_request(row), separators=(",", ":")) + "\n" for row in rows))
    return Load(to, to.server.path, bodies)


def take_turns(bench: Bench, *loads: Load) -> list[dict]:
    """The median figures of each load."""
    for load in loads:
        load.run(1)
    rounds = [[load.run(bench.seconds) for load in loads] for _ in range(bench.rounds)]
    results = [
        {key: statistics.median(r[key] for r in of_one) for key in of_one[0]} for of_one in zip(*rounds, strict=True)
    ]
    for load, f in zip(loads, results, strict=True):
        cost = f"CPU {1e6 * f['cpu'] / f['requests']:,.0f} us a request"
        summary = f"{f['rate']:,.0f} requests/s, p50 {f['p50']:.2f} ms, p99 {f['p99']:.2f} ms, {cost}"
        print(f"  {load.to.server.name}{load.path}: {summary}", file=sys.stderr)
    return results


def compare(bench: Bench, *several: Server) -> list[dict]:
    """Median figures of servers that run at once and are asked for one row."""
    with ExitStack() as stack:
        return take_turns(bench, *(one_row(bench, stack.enter_context(running(s))) for s in several))


def against(
    bench: Bench, peer: Callable, bar: float, ours: Callable = servers.under_uvicorn, slowest: float | None = None
) -> list[dict]:
    """Requests a second against a peer, and the bar of our own p99."""
    mine, theirs = ours(bench.root), peer(bench.root)
    a, b = compare(bench, mine, theirs)
    what = f"{mine.name}, everything on, {CONNECTIONS} connections"
    rows = [at_least(f"{what}, requests/s, against {theirs.name}", a["rate"], b["rate"], bar)]
    return rows + ([at_most(f"{what}, p99, ms", a["p99"], slowest, "ms", b["p99"])] if slowest else [])


def tables(bench: Bench) -> list[dict]:
    """Arrow bodies of many rows against requests of one, by CPU; and against JSON rows to FastAPI, by the clock."""
    rows, path = requests(ROWS), bench.root / "rows"
    path.with_suffix(".json").write_text(json.dumps(rows))
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path.with_suffix(".arrow"), table.schema) as stream:
        stream.write_table(table)
    with running(servers.under_uvicorn(bench.root)) as ours, running(servers.fastapi(bench.root)) as peer:
        arrow = Load(ours, servers.TABLES, path.with_suffix(".arrow"), "whole", servers.ARROW, 4)
        one, many, theirs = take_turns(
            bench,
            one_row(bench, ours),
            arrow,
            Load(peer, "/predict_rows", path.with_suffix(".json"), "whole", connections=4),
        )
    what = f"Arrow bodies of {ROWS:,} rows, everything on"
    by_cpu = [ROWS * many["requests"] / many["cpu"], one["requests"] / one["cpu"]]
    return [
        at_least(f"{what}, rows a CPU second, against requests of one row", *by_cpu, 10),
        at_least(
            f"{what}, 4 connections, rows/s, against JSON rows to FastAPI",
            ROWS * many["rate"],
            ROWS * theirs["rate"],
            5,
        ),
    ]


def shadow(bench: Bench) -> list[dict]:
    """Half-way time with a challenger in the shadow and without."""
    on, off = compare(
        bench, servers.under_uvicorn(bench.root, **servers.SHADOW), servers.under_uvicorn(bench.root, **servers.ALONE)
    )
    return [no_more_than(f"shadow on, {CONNECTIONS} connections, p50, ms, against off", on["p50"], off["p50"], 1.3)]


def log(bench: Bench) -> list[dict]:
    """Requests a second with the log and with one whose append does nothing: a small difference, so in many short
    turns."""
    turns = replace(bench, seconds=1, rounds=bench.seconds * bench.rounds)
    on, off = compare(turns, *(servers.as_factory(bench.root, name) for name in ("logged", "unlogged")))
    return [
        at_least(
            f"log on, {CONNECTIONS} connections, requests/s, against a log that writes nothing",
            on["rate"],
            off["rate"],
            0.93,
        )
    ]


def memory(bench: Bench) -> list[dict]:
    """Resident memory over a long run: at its end and after its first tenth."""
    with running(servers.under_uvicorn(bench.root)) as ours:
        load, done, sizes = one_row(bench, ours), 0, []
        while done < bench.requests:
            done += load.run(bench.seconds)["requests"]
            sizes.append((done, ours.memory()))
    early = next(size for count, size in sizes if count >= bench.requests / 10)
    name = f"resident memory after {bench.requests:,} requests, MB, against that after a tenth of them"
    return [no_more_than(name, sizes[-1][1], early, 1.1)]


def swap(bench: Bench) -> list[dict]:
    """Errors and seconds until the new version answers, while the champion changes twice."""
    registry = servers.registry(bench.root)
    with running(servers.under_uvicorn(bench.root, **servers.ALONE)) as ours, ThreadPoolExecutor() as pool:
        load = replace(one_row(bench, ours), pause=1000 * CONNECTIONS // RATE - 3)  # an answer takes its time too
        under_load = pool.submit(load.run, 2 * bench.seconds)
        time.sleep(bench.seconds / 2)
        waits = [seconds_until(registry, ours, number) for number in (2, 1)]
        results = under_load.result()
    what = f"swap under {results['rate']:.0f} requests/s"
    return [
        at_most(f"{what}, errors", results["errors"], 0, ""),
        at_most(f"{what}, until the new version answers, s", max(waits), 1, "s"),
    ]


def seconds_until(registry, ours: Running, number: int) -> float:
    """From before a version is released to its first answer."""
    body, begin = json.dumps(requests(1)[0]).encode(), time.perf_counter()
    registry.set_alias("speed", "champion", number)
    while json.loads(ours.ask(ours.server.path, body))["model_version"] != servers.VERSIONS[number]:
        if time.perf_counter() - begin > 30:
            sys.exit(f"version {number} does not answer 30 s after it was released")
        time.sleep(0.005)
    return time.perf_counter() - begin


BENCHMARKS = {
    "fastapi": partial(against, peer=servers.fastapi, bar=1, slowest=12),
    "bentoml": partial(against, peer=servers.bentoml, bar=4, ours=servers.under_bentoml, slowest=60),
    "tables": tables,
    "litserve": partial(against, peer=servers.litserve, bar=3),
    "mlserver": partial(against, peer=servers.mlserver, bar=3),
    "mlflow": partial(against, peer=servers.mlflow, bar=3),
    "shadow": shadow,
    "log": log,
    "memory": memory,
    "swap": swap,
}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="measure this part; default: all of them")
    parser.add_argument("--seconds", type=int, default=5, help="of load, each time")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts")
    parser.add_argument("--requests", type=int, default=300_000, help="of the run that watches memory")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are ended all the same
    chosen = {name: measure for name, measure in BENCHMARKS.items() if name in (options.only or BENCHMARKS)}
    needs.wrk()
    for name in chosen.keys() & needs.PEERS.keys():
        needs.peer(name)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(servers.project(Path(folder)), options.seconds, options.rounds, options.requests)
        results = [row for measure in chosen.values() for row in measure(bench)]
    finish(results, options.json)


if __name__ == "__main__":
    main()
