"""The whole road on real flights of 2013, with the project's own settings: pipeline, Bento, service, later flights, drift.

Run it with `make demo`. It leaves products/, .mlnb/ and no process behind.
"""

import json
import os
import signal
import socket
import subprocess
import sys
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
MOMENTS = 60  # quarters of an hour sampled from each month that is served
say = Console(highlight=False)


def mlnb(*words: str):
    """A command of mlnb; the demo ends where it fails."""
    say.print(f"[dim]$ mlnb {' '.join(words)}[/]")
    done = subprocess.run([sys.executable, "-m", "mlnb.cli.main", *words], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def heading(text: str):
    say.print(f"\n[bold]{text}[/]")


def show_scores():
    """Every model beside its baselines, July to December."""
    document = json.loads((FLIGHTS / "scores.json").read_text())
    table = Table(box=None, pad_edge=False)
    for name in ("July-December", "AUC", "PR-AUC", "log-loss", "ECE", "cost per 1000"):
        table.add_column(name, justify="left" if name == "July-December" else "right")
    for name, scores in document["models"].items():
        s = scores["overall"]
        figures = [f"{s[k]:.3f}" for k in ("auc", "pr_auc", "log_loss", "ece")]
        table.add_row(name, *figures, f"{s['cost_per_1000']:.0f}")
    say.print(table)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def service():
    """The newest Bento on a free port: its address while the block runs, no process after it."""
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
    """Return when the service answers, end the demo with its log where it does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(f"the service did not get ready; its log ({log}) ends with:\n{log.read_text()[-2000:]}")


def later_flights() -> pd.DataFrame:
    """The flights of July to December that are decided at `MOMENTS` random quarters of an hour of each month."""
    flights = pd.read_parquet(FLIGHTS / "features.parquet")
    flights = flights[flights.month >= 7]
    moments = flights.drop_duplicates("moment")[["month", "moment"]].groupby("month").sample(MOMENTS, random_state=0)
    return flights[flights.moment.isin(moments.moment)].sort_values("decision_time")


def write_context(moments: np.ndarray):
    """What was known at each moment, where the service looks for it."""
    from mlnb.data.context import SnapshotStore
    from mlnb.flights.context import write_snapshots
    from mlnb.flights.features import read_history
    from mlnb.project.settings import load_settings

    settings = load_settings(ROOT)
    history = read_history(str(FLIGHTS / "flights.parquet"), str(FLIGHTS / "weather.parquet"))
    write_snapshots(history, moments, SnapshotStore(f"{settings.url(settings.storage)}/context"))


def send(url: str, flights: pd.DataFrame) -> list[dict]:
    """The service's answers, a request for each moment's flights."""
    fields = ["carrier", "flight", "origin", "dest", "distance", "scheduled_departure", "scheduled_arrival", "decision_time"]
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
    """A few answers beside what happened to the flight."""
    table = Table(box=None, pad_edge=False)
    for name in ("flight", "scheduled (UTC)", "probability", "alert", "what happened", "context age"):
        table.add_column(name)
    shown = flights.assign(answer=answers).groupby("month").sample(1, random_state=1)
    for row in shown.itertuples():
        happened = "disrupted" if row.disrupted else "on time"
        age = f"{row.answer['context_age_seconds'] // 60} min"
        route = f"{row.carrier} {row.flight} {row.origin}-{row.dest}"
        alert = "yes" if row.answer["decision"] else "no"
        table.add_row(route, f"{row.scheduled_departure:%d %b %H:%M}", f"{row.answer['probability']:.2f}", alert, happened, age)
    say.print(table)
    alerts, disrupted = sum(a["decision"] for a in answers), int(flights.disrupted.sum())
    say.print(f"{len(answers):,} flights answered, {alerts:,} alerts, {disrupted:,} were disrupted; all of it is in the log.")


def main():
    started = time.monotonic()
    (ROOT / ".mlnb").mkdir(exist_ok=True)
    heading("1  The pipeline: notebooks from raw data to a model bundle")
    mlnb("run")
    heading("2  Scores beside the baselines")
    show_scores()
    heading("3  The bundle becomes a Bento")
    mlnb("build")
    heading("4  The Bento is served and asked about later flights")
    flights = later_flights()
    with say.status("writing what was known at each moment ..."):
        write_context(flights.moment.unique())
    with say.status("starting the service ...") as status, service() as url:
        status.update("sending flights ...")
        answers = send(url, flights)
    show_answers(flights, answers)
    heading("5  How far has the world moved from January to May?")
    mlnb("drift", "log", "--by", "month", "--html", str(FLIGHTS.relative_to(ROOT) / "drift.html"))
    heading("Where to look next")
    for what, where in {
        "executed notebooks": "products/flights/*.ipynb",
        "drift page, opens offline": "products/flights/drift.html",
        "runs, models, curves": "mlflow ui --backend-store-uri sqlite:///.mlnb/mlflow.db",
        "write in JupyterLab": "jupyter lab nbs/flights",
        "a project of your own": "mlnb new delays",
    }.items():
        say.print(f"  {what:28}{where}", soft_wrap=True)
    say.print(f"\nDone in {time.monotonic() - started:.0f} s; no process is left behind.")


if __name__ == "__main__":
    main()
