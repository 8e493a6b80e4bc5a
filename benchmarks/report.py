"""Measurements in one form, printed as text or JSON; the exit status is 1 if a bar does not hold."""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NoReturn


def row(name: str, ours, bar=None, holds: bool = True, peer: float | None = None, ratio: float | None = None) -> dict:
    """One measurement; without a bar it is only reported."""
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "bar": bar, "holds": bool(holds)}


def at_least(name: str, ours: float, peer: float, bar: float) -> dict:
    """Higher is better: ours is at least `bar` times the peer's."""
    return row(name, ours, bar, ours >= bar * peer, peer, ours / peer)


def faster(name: str, ours: float, peer: float, bar: float) -> dict:
    """Lower is better: the peer's is at least `bar` times ours."""
    return row(name, ours, bar, peer >= bar * ours, peer, peer / ours)


def at_most(name: str, ours: float, bar: float, unit: str = "", peer: float | None = None) -> dict:
    """Ours is at most `bar`."""
    return row(name, ours, f"at most {bar:g} {unit}".strip(), ours <= bar, peer, ours / peer if peer else None)


def no_more_than(name: str, ours: float, peer: float, bar: float) -> dict:
    """Lower is better: ours is at most `bar` times the peer's."""
    return row(name, ours, f"at most {bar:g}x", ours <= bar * peer, peer, ours / peer)


def median_seconds(work: Callable[[], object], times: int, clock: Callable[[], float] = time.process_time) -> float:
    """The median time of a piece of work; by default CPU time."""
    elapsed = []
    for _ in range(times):
        gc.collect()
        start = clock()
        work()
        elapsed.append(clock() - start)
    return statistics.median(elapsed)


def formatted(value) -> str:
    """A figure with three digits; text as it is."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options of a benchmark; add yours, then call `parse_args`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON list")
    return parser


def finish(rows: list[dict], as_json: bool) -> NoReturn:
    """Print the rows and end the program."""
    if as_json:
        print(json.dumps(rows))
    else:
        for r in rows:
            peer = f", peer {formatted(r['peer'])}" if r["peer"] is not None else ""
            ratio = f", {formatted(r['ratio'])}x" if r["ratio"] else ""
            verdict = "holds" if r["holds"] else "FAILS"
            print(f"{r['name']}: {formatted(r['ours'])}{peer}{ratio}, bar {formatted(r['bar']) or 'none'}: {verdict}")
    sys.exit(0 if all(r["holds"] for r in rows) else 1)
