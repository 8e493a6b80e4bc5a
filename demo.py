"""The whole path on real flights of 2013, with the project's own settings: pipeline, Bento, service, later flights,
drift, alerts.

Run it with `make demo`. It creates products/ and .mlnb/ and leaves no process behind.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent
FLIGHTS = ROOT / "products" / "flights"
console = Console(highlight=False)


def mlnb(*words: str, accepted_codes: tuple[int, ...] = (0,)):
    """Run a command of mlnb; end the demo if its exit code is not accepted."""
    console.print(f"[dim]$ mlnb {' '.join(words)}[/]")
    done = subprocess.run([sys.executable, "-m", "mlnb.cli.main", *words], cwd=ROOT)
    if done.returncode not in accepted_codes:
        sys.exit(done.returncode)


def heading(text: str):
    console.print(f"\n[bold]{text}[/]")


def show_scores():
    """Show the model and its baselines, July to December."""
    document = json.loads((FLIGHTS / "scores.json").read_text())
    table = Table(box=None, pad_edge=False)
    for name in ("July-December", "AUC", "PR-AUC", "log-loss", "ECE", "cost per 1000"):
        table.add_column(name, justify="left" if name == "July-December" else "right")
    for name, scores in document["models"].items():
        s = scores["overall"]
        figures = [f"{s[k]:.3f}" for k in ("auc", "pr_auc", "log_loss", "ece")]
        table.add_row(name, *figures, f"{s['cost_per_1000']:.0f}")
    console.print(table)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def service():
    """Serve the newest Bento on a free port while the block runs."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    log = ROOT / ".mlnb" / "demo-service.log"
    with log.open("w") as output:
        words = [sys.executable, "-m", "mlnb.cli.main", "serve", "--port", str(port)]
        process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until_ready(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(url: str, process: subprocess.Popen, log: Path, seconds: float = 120):
    """Return when the service is ready; end the demo with its log if it does not start."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(f"the service did not start; its log ({log}) ends with:\n{log.read_text()[-2000:]}")


def sample_later_flights() -> pd.DataFrame:
    """The flights with a decision on one random day of each month from July to December."""
    flights = pd.read_parquet(FLIGHTS / "features.parquet")
    flights = flights[flights.month >= 7]
    days = flights.decision_time.dt.floor("D")
    chosen = days.drop_duplicates().groupby(flights.month).sample(1, random_state=0)
    return flights[days.isin(chosen)].sort_values("decision_time")


def scored_flights_file() -> str:
    """A file with every flight of July to December, its score and its decision."""
    flights, scores = (pd.read_parquet(FLIGHTS / f"{name}.parquet") for name in ("features", "predictions"))
    scores["scheduled_departure"] = scores["scheduled_departure"].dt.tz_localize(None)
    keys = ["carrier", "flight", "origin", "scheduled_departure"]
    table = flights.merge(scores[[*keys, "probability", "decision"]], on=keys).drop(columns=["disrupted", "label_time"])
    table.to_parquet(path := ROOT / ".mlnb" / "scored.parquet")
    return str(path.relative_to(ROOT))


def labels_file(flights: pd.DataFrame) -> str:
    """A file with the labels of flights and when they were observed."""
    columns = {name: name for name in ("carrier", "flight", "origin", "scheduled_departure")}
    columns |= {"disrupted": "value", "label_time": "observed_at"}
    labels = flights[list(columns)].rename(columns=columns)
    for name in ("scheduled_departure", "observed_at"):
        labels[name] = labels[name].dt.tz_localize("UTC")
    labels.to_parquet(path := ROOT / ".mlnb" / "labels.parquet", index=False)
    return str(path.relative_to(ROOT))


def publish_snapshots(as_of_times: np.ndarray):
    """Publish feature snapshots for the service."""
    from mlnb.data.snapshot_store import SnapshotStore
    from mlnb.flights.features import read_history
    from mlnb.flights.snapshots import write_snapshots
    from mlnb.project.settings import load_settings

    settings = load_settings(ROOT)
    history = read_history(str(FLIGHTS / "flights.parquet"), str(FLIGHTS / "weather.parquet"))
    write_snapshots(history, as_of_times, SnapshotStore.of(settings))


def send(url: str, flights: pd.DataFrame) -> list[dict]:
    """The service's answers to one request for each decision time."""
    fields = [
        "carrier",
        "flight",
        "origin",
        "dest",
        "distance",
        "scheduled_departure",
        "scheduled_arrival",
        "decision_time",
    ]
    answers = []
    for _, group in flights[["moment", *fields]].groupby("moment"):
        rows = group[fields].copy()
        for name in ("scheduled_departure", "scheduled_arrival", "decision_time"):
            rows[name] = rows[name].dt.strftime("%Y-%m-%dT%H:%M:%SZ")
        body = json.dumps(rows.to_dict("records")).encode()
        request = urllib.request.Request(f"{url}/predict", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            answers += json.load(answer)
    return answers


def show_answers(flights: pd.DataFrame, answers: list[dict]):
    """Show a few answers and their labels."""
    table = Table(box=None, pad_edge=False)
    for name in ("flight", "scheduled (UTC)", "probability", "warn", "label", "snapshot age"):
        table.add_column(name)
    examples = flights.assign(answer=answers).groupby("month").sample(1, random_state=1)
    for row in examples.itertuples():
        happened = "disrupted" if row.disrupted else "on time"
        age = f"{row.answer['context_age_seconds'] // 60} min"
        route = f"{row.carrier} {row.flight} {row.origin}-{row.dest}"
        positive = "yes" if row.answer["decision"] else "no"
        table.add_row(
            route, f"{row.scheduled_departure:%d %b %H:%M}", f"{row.answer['probability']:.2f}", positive, happened, age
        )
    console.print(table)
    positives, disrupted = sum(a["decision"] for a in answers), int(flights.disrupted.sum())
    console.print(
        f"{len(answers):,} flights answered, {positives:,} positive decisions, {disrupted:,} were disrupted; "
        f"all are in the log."
    )


@contextmanager
def no_process_left():
    """Use separate warm kernels and end them with the demo; wait for the process that logs the run to MLflow."""
    os.environ["MLNB_RUNTIME_DIR"] = folder = tempfile.mkdtemp(prefix="mlnb-")
    try:
        yield
    finally:
        subprocess.run(
            [sys.executable, "-m", "mlnb.cli.main", "kernels", "stop", "--kill"], cwd=ROOT, capture_output=True
        )
        shutil.rmtree(folder, ignore_errors=True)
        (ROOT / ".mlnb" / "locks").mkdir(parents=True, exist_ok=True)
        with (ROOT / ".mlnb" / "locks" / "tracker.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def main():
    started = time.monotonic()
    (ROOT / ".mlnb").mkdir(exist_ok=True)
    with no_process_left():
        walk_through()
    console.print(f"\nDone in {time.monotonic() - started:.0f} s; no process was left behind.")


def walk_through():
    heading("1  The pipeline: notebooks from raw data to a model bundle")
    mlnb("run")
    heading("2  Scores of the model and its baselines")
    show_scores()
    heading("3  Package the bundle as a Bento")
    mlnb("build")
    heading("4  Serve the Bento and send it later flights")
    flights = sample_later_flights()
    with console.status("publishing feature snapshots ..."):
        publish_snapshots(flights.moment.unique())
    with console.status("starting the service ...") as status, service() as url:
        status.update("sending flights ...")
        answers = send(url, flights)
    show_answers(flights, answers)
    heading("5  Drift of the served days, then of every flight by month")
    mlnb("drift", "log", "--window", "day")
    mlnb("drift", scored_flights_file(), "--window", "month", "--html", str(FLIGHTS.relative_to(ROOT) / "drift.html"))
    heading("6  Add ground-truth labels and score the decisions")
    mlnb("labels", "add", labels_file(flights))
    mlnb("performance", "--group-by", "origin", "--html", str(FLIGHTS.relative_to(ROOT) / "performance.html"))
    heading("7  Evaluate the alert rules, as cron would")
    console.print(
        "Rules need recent traffic, and the flights of 2013 are old: some rules may report that they have no data."
    )
    mlnb("alerts", "check", accepted_codes=(0, 1))
    heading("Where to look next")
    for description, where in {
        "executed notebooks": "products/flights/*.ipynb",
        "this run and earlier ones": "mlnb runs",
        "what would run, and why": "mlnb plan",
        "drift page, opens offline": "products/flights/drift.html",
        "performance page": "products/flights/performance.html",
        "open alerts": "mlnb alerts list",
        "runs, models, curves": "mlflow ui --backend-store-uri sqlite:///.mlnb/mlflow.db",
        "write in JupyterLab": "jupyter lab nbs/flights",
        "a project of your own": "cd .. && mlnb new delays",
    }.items():
        console.print(f"  {description:28}{where}", soft_wrap=True)


if __name__ == "__main__":
    main()
