"""Performance before and after labels: what was expected beside what came, labels that arrive by the hour, and a
million of both.

Expected monthly AUC, cost and log-loss of the flights of July to December (CBPE, from the probabilities alone) beside
the realised ones: ours is what was expected, the peer is what came, and the error stands in the name. They are
reported, no bar holds or breaks.
"""

import needs

needs.packages()

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from report import arguments, at_most, finish, row

from mlnb.models.binary import Binary, cost_objective
from mlnb.models.metrics import Cost
from mlnb.monitoring.labels import import_labels
from mlnb.monitoring.performance import measure_performance
from mlnb.serving.labels import LabelStore

FLIGHTS = Path(__file__).parent.parent / "products" / "flights"
OBJECTIVE, LABEL_HOURS, END = cost_objective(Cost(1, 3)), 24, np.datetime64("2014-02-01")
FIGURES = {"auc": ("AUC", ".4f"), "cost_per_1000": ("cost per 1000", ".1f"), "log_loss": ("log-loss", ".4f")}


def as_utc(times):
    return pa.array(np.asarray(times).astype("datetime64[us]")).cast(pa.timestamp("us", "UTC"))


def tables(entity, decided, p, positive_decisions, y, observed) -> tuple[pa.Table, pa.Table]:
    """Decisions as the log has them, and outcomes as the store has them."""
    n, entity = len(p), pa.array(entity, pa.string())
    predictions = {
        "entity": entity,
        "time": as_utc(decided),
        "logged_at": as_utc(decided),
        "model_version": ["v1"] * n,
        "arm": ["champion"] * n,
    }
    labels = {
        "entity": entity,
        "value": np.asarray(y, float),
        "observed_at": as_utc(observed),
        "received_at": as_utc(observed),
    }
    return pa.table(predictions | {"probability": np.asarray(p), "decision": np.asarray(positive_decisions)}), pa.table(
        labels | {"source": ["flights"] * n}
    )


def flights() -> tuple[pa.Table, pa.Table]:
    """The decisions on the flights of July to December, and when what became known."""
    key = ["carrier", "flight", "origin", "scheduled_departure"]
    known = pd.read_parquet(FLIGHTS / "features.parquet", columns=[*key, "decision_time", "label_time"])
    prediction_rows = pd.read_parquet(FLIGHTS / "predictions.parquet")
    prediction_rows["scheduled_departure"] = prediction_rows["scheduled_departure"].dt.tz_convert(None)
    rows = prediction_rows.merge(known, on=key, validate="one_to_one")
    name = rows.carrier + "/" + rows.flight.astype(str) + "/" + rows.origin + "/" + rows.scheduled_departure.astype(str)
    return tables(name, rows.decision_time, rows.probability, rows.decision, rows.disrupted, rows.label_time)


def expectations(predictions: pa.Table, labels: pa.Table) -> list[dict]:
    """Expected and realised figures of every month."""
    found = measure_performance(predictions, labels, Binary(), LABEL_HOURS, END, samples=0, objective=OBJECTIVE)
    months = [m for m in found.months if m.days > 1]
    return [
        row(
            f"CBPE, {m.name}: {labels}, expected against realised, error {m.error[name]:+{form}}",
            m.expected[name],
            peer=m.realised[name],
        )
        for name, (labels, form) in FIGURES.items()
        for m in months
    ]


def replayed(predictions: pa.Table, labels: pa.Table, weeks: int) -> list[dict]:
    """Labels by the hour for some weeks: days that were scored early, and the largest difference from all labels at
    once."""
    start, end = np.datetime64("2013-07-01T00:00"), np.datetime64("2013-07-01T00:00") + np.timedelta64(7 * weeks, "D")
    predictions = predictions.filter(predictions["time"].to_numpy() < end)
    early, scored, observed = 0, {}, labels["observed_at"].to_numpy()
    for hour in range(24, 24 * (7 * weeks + 3)):
        as_of = start + np.timedelta64(hour, "h")
        days = measure_performance(
            predictions, labels.filter(observed <= as_of), Binary(), LABEL_HOURS, as_of, samples=0, objective=OBJECTIVE
        ).days
        early += sum(
            bool(d.realised is not None and np.datetime64(d.name) + np.timedelta64(24 + LABEL_HOURS, "h") > as_of)
            for d in days
        )
        scored |= {d.name: d for d in days if d.realised is not None and d.name not in scored}
    batch = measure_performance(predictions, labels, Binary(), LABEL_HOURS, END, samples=0, objective=OBJECTIVE).days
    largest_difference = max(
        abs(scored[d.name].realised[name] - value) for d in batch for name, value in d.realised.items()
    )
    prefix = f"labels of {weeks} weeks by the hour"
    return [
        row(f"{prefix}: days scored before their window had closed", early, "none", early == 0),
        at_most(f"{prefix}: largest difference from all labels at once", largest_difference, 1e-9),
    ]


def a_million(n: int = 1_000_000) -> list[dict]:
    """CPU seconds to keep, to join and to score a million outcomes of a million predictions."""
    rng = np.random.default_rng(0)
    decided = np.datetime64("2013-01-01T00:00") + np.sort(rng.integers(0, 180 * 1440, n)) * np.timedelta64(1, "m")
    p = np.round(rng.beta(1.5, 4, n), 9)
    observed = decided + np.timedelta64(5, "h")
    predictions, labels = tables(
        [f"UA/{i}/EWR/2013-07-01T09:15:00Z" for i in range(n)], decided, p, p >= 1 / 3, rng.random(n) < p, observed
    )
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(labels.select(["entity", "value", "observed_at"]), file := Path(folder) / "labels.parquet")
        store = LabelStore(Path(folder) / "lines", f"{folder}/parts")
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert import_labels(file, store, predictions).added == n
        kept, more = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        table = store.read()
        read = time.process_time()
        found = measure_performance(predictions, table, Binary(), LABEL_HOURS, END, objective=OBJECTIVE)
        scored = time.process_time()
        size = sum(store.parts().values()) / n
    assert found.overall.known == n
    return [
        row(f"{n:,} outcomes of a file kept, checked against {n:,} predictions, CPU s", kept - start),
        row(f"{n:,} outcomes of a file kept, memory beyond the predictions, MB", more / 1024),
        row(f"{n:,} outcomes kept, bytes an outcome", size),
        row(f"{n:,} outcomes read, CPU s", read - kept),
        row(f"{n:,} predictions joined with {n:,} outcomes, 180 days scored with intervals, CPU s", scored - read),
    ]


def main():
    """Measure, print, and exit with 1 if a bar does not hold."""
    options = arguments(__doc__)
    options.add_argument("--weeks", type=int, default=3, help="weeks of labels that are replayed by the hour")
    chosen = options.parse_args()
    predictions, labels = flights()
    finish(
        [*expectations(predictions, labels), *replayed(predictions, labels, chosen.weeks), *a_million()], chosen.json
    )


if __name__ == "__main__":
    main()
