"""Writes small files of every kind that mlnb writes, with the code of the release that is checked out.

    python tests/data/make_release.py tests/data/release-0.1

Later releases read them in tests/test_compatibility.py. It ran once, with the code of 0.1, and need not run with any
later one: it is here to show how the files came about. It works below /project, which must not exist and is removed,
so that the files name no path of a machine, and under the host name `host`.

service/         the toy project of the tests with a bundle that has context, reference and drift null, another one as
challenger, the log (lines, columns, Parquet, profiles), outcomes, records with runs and alerts, and what a watcher
and a router write scorecard/       a bundle of a model without context planes/          a pipeline whose tasks ran:
records of the tasks, and their products flight-delays/   what `mlnb new` makes, with settings, rules, channels and
commands as a user writes them
"""

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pandas as pd
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
import pipeline_project
import toy_project

ROOT, DAYS = Path("/project"), ("2013-07-31", "2013-08-01")


def mlnb(root: Path, *words: str, codes=(0,)) -> str:
    "What a command prints in a project, run in this process"
    from mlnb.cli.main import cli

    os.chdir(root)
    done = CliRunner(env={"COLUMNS": "160"}).invoke(cli, words)
    assert done.exit_code in codes, f"{words}: {done.output}{done.exception!r}"
    return done.stdout


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text).lstrip("\n"))


# --- a project with a model that is served ----------------------------------------------------------------------------

SERVICE = """
    [project]
    name = "service"
    version = "0"

    [tool.mlnb]
    package = "shipped"
    keys_required = false
    context_limit_minutes = 100000  # the context of one day serves all
    cost_missed = 3.0
    profile_segments = ["origin"]

    [tool.mlnb.alerts.age]
    kind = "freshness"
    context_minutes = 60
    outcome_minutes = 2880

    [tool.mlnb.alerts.pipeline]
    kind = "runs"
    clear_after = 1

    [tool.mlnb.channels.file]
    kind = "log"

    [tool.mlnb.channels.hook]
    kind = "webhook"
    url = "$HOOK"
"""


def training_rows():  # DataFrame
    "Rows of 35 days with what the model sees and says, as a reference is made from"
    from shipped.features import request_features
    from shipped.model import Logistic

    rng, n = np.random.default_rng(0), 35 * 12
    request = {
        "carrier": rng.choice(["UA", "B6", "DL"], n), "flight": rng.integers(100, 200, n).astype(float),
        "origin": rng.choice(["JFK", "EWR", "LGA"], n), "distance": rng.uniform(200, 2400, n).round(),
        "departure": np.datetime64("2013-06-01T00:00:00") + np.arange(n) * 7200,
    }  # fmt: skip
    features = request_features(request) | {"backlog": rng.integers(1, 4, n).astype(float)}
    probability = Logistic((0.5, 0.05, -0.3, 0.4)).predict(features)
    return pd.DataFrame(request | features | {"probability": probability, "decision": probability >= 1 / 3})


def make_bundles(root: Path):
    from mlnb.monitoring.null import calibrate
    from shipped.bundle import build

    from mlnb.data.profiles import Profile

    rows = training_rows()
    null = calibrate(rows, "departure", request=("origin", "distance"), left_out=("flight",)).to_bytes()
    segments = {"origin=JFK": (Profile.of(rows[rows["origin"] == "JFK"]).to_bytes(), None)}
    reference = {"reference": Profile.of(rows).to_bytes(), "drift": null, "segments": segments}
    build(
        root / "products/bundle",
        "v1",
        **reference,
        training={"run_id": "20260101T120000-aaaa01", "scores": {"auc": 0.75}},
    )
    build(root / "products/v1", "v1")
    build(root / "products/v2", "v2", weights=(-0.5, 0.01, 0.2, 0.1))


def store_context(root: Path):
    from mlnb.data.context import SnapshotStore
    from shipped.bundle import history
    from shipped.features import context_features

    from mlnb.project.settings import load_settings

    store = SnapshotStore.of(load_settings(root))
    for snapshot in context_features.snapshots(history(), np.datetime64("2013-07-01T02:00:00") + np.arange(4) * 3600):
        store.write(snapshot)


def answer(root: Path, hours: list[str], rows: int = 6):
    "Have a champion and its challenger answer requests that are decided in these hours"
    from mlnb.models.bundle import columns_of
    from mlnb.project.settings import load_settings
    from mlnb.serving.predictor import Rows
    from mlnb.serving.routing import Router, proved

    settings = replace(load_settings(root), challenger_percent=30)
    champion = proved(root / "products/bundle")
    router = Router(settings, champion, proved(root / "products/v2"))
    samples = champion.samples["requests"]
    for number, hour in enumerate(hours):
        sent = [f"{hour}:{i * 5:02}:00Z" for i in range(rows)]
        own = [
            {"origin": "JFK" if i % 2 else "EWR", "flight": 100 * number + i, "decision_time": at}
            for i, at in enumerate(sent)
        ]
        raw = [sample | mine for sample, mine in zip(samples, own, strict=False)]
        decisions = np.array([at[:-1] for at in sent], "datetime64[s]")
        router(Rows(raw, columns_of(champion.request, raw), decisions, dt.datetime.now(dt.UTC)))
    router.stop()


def score(root: Path, at: str):
    "Have a table scored and logged, which is logged as columns"
    table = pd.DataFrame(json.loads((root / "products/bundle/samples.json").read_text())["requests"]).drop(
        columns="decision_time"
    )
    table[table["origin"] == "JFK"].assign(flight=table["flight"] + 900).to_csv(root / "in.csv", index=False)
    mlnb(root, "score", "in.csv", "out.csv", "--log", "--at", at, "--overwrite")
    for name in ("in.csv", "out.csv"):
        (root / name).unlink()


def report_outcomes(root: Path, first: int):
    "Outcomes as the service takes them"
    from mlnb.serving.outcomes import OutcomeLog, read_outcomes

    from mlnb.project.settings import load_settings
    from mlnb.serving.predictions import read

    log, settings = OutcomeLog.of(load_settings(root)), load_settings(root)
    keys = read(settings.path(settings.predictions))["entity"].tolist()[first : first + 3]
    sent = [{"entity": key, "value": i % 2, "observed_at": "2013-08-04T00:00:00Z"} for i, key in enumerate(keys)]
    log.append(read_outcomes(json.dumps(sent).encode()))
    log.close()


def add_outcomes(root: Path):
    "A file of outcomes of all that the compacted log holds"
    entities = [row["entity"] for row in json.loads(mlnb(root, "predictions", "--json", "--limit", "1000"))]
    table = pd.DataFrame({"entity": list(dict.fromkeys(entities))})
    table["value"], table["observed_at"] = (np.arange(len(table)) % 3 == 0).astype(int), "2013-08-04T00:00:00Z"
    table.to_csv("y.csv", index=False)
    mlnb(root, "outcomes", "add", "y.csv")
    (root / "y.csv").unlink()


def damage(folder: Path):
    "Append a whole line that is no record"
    (file,) = folder.glob("*.jsonl")
    with file.open("ab") as opened:
        opened.write(b'{"entity": "UA/100", "time": "yesterday"}\n')


def make_records(root: Path):
    "Two runs, one of which failed; alerts of a check, told to a file and not to a webhook, one of them acknowledged"
    from mlnb.records import Records

    records = Records("sqlite:////project/service/.mlnb/records.db")
    for run_id, ended, seed in (("20260101T120000-aaaa01", "succeeded", 0), ("20260301T120000-bbbb02", "failed", 1)):
        month = run_id[4:6]
        row = {
            "pipeline": "service",
            "parameters": {"seed": seed},
            "status": ended,
            "process": "7@host",
            "selection": {"force": True},
        }
        row |= {
            "started": f"2026-{month}-01T12:00:00",
            "ended": f"2026-{month}-01T12:01:40",
            "code": {"commit": "0" * 40, "dirty": False},
        }
        records.put([("run", {"id": run_id}, row)])
        part = {"notebook": "111111", "code": {"shipped.features.request_features": ["function", f"22222{seed}"]}}
        records.put_task(run_id, "features", status="skipped", fingerprint=part | {"packages": {"pandas": "3.0.1"}})
        metrics = {
            "status": "executed",
            "seconds": 10.0,
            "attempts": 1,
            "metrics": {"auc": 0.75},
            "reason": "never ran",
        }
        records.put_task(run_id, "train", **metrics, notebook=f".mlnb/runs/{run_id}/train.ipynb", fingerprint=part)
        if seed:
            records.put_task(run_id, "register", status="failed", seconds=0.5, error="KeyError: 'gone'", cell=4)
    records.close()
    checked = json.loads(mlnb(root, "alerts", "check", "--json", codes=(1,)))
    assert len(checked["alerts"]) == 2, checked
    mlnb(root, "alerts", "ack", str(checked["alerts"][0]["id"]), "--note", "on it", "--by", "ada")


def release(root: Path):
    "What a watcher writes that follows a registry, and a router that is asked for another routing"
    from mlnb.models.watcher import Watcher, releases_folder
    from mlnb.project.settings import load_settings
    from mlnb.serving.routing import Routing, RoutingFile

    settings = replace(load_settings(root), serve_from="models:/toy")
    bundles = {1: root / "products/v1", 2: root / "products/v2"}
    registry = SimpleNamespace(
        file=None, url=settings.url(settings.tracking), aliases=lambda model: {"champion": 1, "challenger": 2},
        run_of=lambda model, number: f"run{number}",
        download=lambda model, number, folder: shutil.copytree(bundles[number], folder),
    )  # fmt: skip
    folder = releases_folder(settings)
    watcher = Watcher(registry, "toy", folder)
    watcher.look()
    assert watcher.releases.problem is None, watcher.releases
    RoutingFile(settings).write(Routing(25, True))


def make_service(root: Path):
    renamed = lambda text: text.replace("toy.features", "shipped.features").replace("toy.model", "shipped.model")
    modules = {"features": toy_project.FEATURES, "model": toy_project.MODEL, "bundle": toy_project.BUNDLE}
    for name, text in {"__init__": "", **modules}.items():
        write(root / "shipped" / f"{name}.py", renamed(text))
    write(root / "pyproject.toml", SERVICE)
    sys.path.insert(0, str(root))
    os.chdir(root)
    make_bundles(root)
    store_context(root)
    answer(root, [f"{day}T05" for day in DAYS])
    score(root, f"{DAYS[1]}T06:00:00Z")
    report_outcomes(root, 0)
    mlnb(root, "compact")
    add_outcomes(root)
    answer(root, ["2013-08-02T05"], 10)
    damage(root / ".mlnb/predictions")
    score(root, "2013-08-02T06:00:00Z")
    report_outcomes(root, 3)
    damage(root / ".mlnb/outcomes")
    make_records(root)
    release(root)


def make_scorecard(root: Path):
    for name, text in {"__init__": "", "model": toy_project.PLAIN_MODEL, "bundle": toy_project.PLAIN_BUNDLE}.items():
        write(root / "scorecard" / f"{name}.py", text.replace("from plain.model", "from scorecard.model"))
    write(root / "pyproject.toml", toy_project.PYPROJECT.replace('"toy"', '"scorecard"'))
    sys.path.insert(0, str(root))
    os.chdir(root)
    from scorecard.bundle import build

    build(root / "products/bundle", ["customer"])


# --- projects with a pipeline -----------------------------------------------------------------------------------------


def make_planes(root: Path):
    pipeline_project.make(root)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MLNB_")}
    with tempfile.TemporaryDirectory(prefix="mlnb-") as runtime:
        variables |= {"MLNB_TRACK_RUNS": "false", "MLNB_RUNTIME_DIR": runtime, "MLNB_WARM_KERNELS": "false"}
        command = [sys.executable, "-m", "mlnb.cli.main", "run"]
        subprocess.run(command, cwd=root, env=variables | {"PYTHONPATH": str(root)}, check=True)


SETTINGS = """
    bundle = "products/flight_delays/bundle"
    keys_required = false  # the service answers this machine without a key, and no other
    outcomes = ".mlnb/outcomes"
    cost_alert = 1.0
    cost_missed = 3.0
    context_limit_minutes = 90
    waiting_limit = 32
    request_seconds = 5
    log_full = "serve"
    log_keep_days = 400
    versions = ".mlnb/versions"
    image_base = "cpu"

    [tool.mlnb.env.production]
    outcomes = "/project/outcomes"  # of all machines
    cost_missed = 4.0
    keys_required = true

    [tool.mlnb.alerts.costs]
    kind = "performance"
    metric = "cost_per_1000"
    apart = 50.0
    to = ["ops"]

    [tool.mlnb.alerts.up]
    kind = "service"
    error_share = 0.02
    requests = 100

    [tool.mlnb.alerts.age]
    kind = "freshness"
    context_minutes = 60
    outcome_minutes = 2880

    [tool.mlnb.channels.ops]
    kind = "slack"
    url = "$OPS_WEBHOOK"
    quiet = "22:00-07:00"
    time_zone = "Europe/Vienna"

    [tool.mlnb.channels.file]
    kind = "log"
    quiet = "00:00-05:00"
"""

MONITOR = """
    name: monitor
    on:
      schedule: [{cron: "15 * * * *"}]
    env:
      MLNB_OUTCOMES: /project/outcomes
      MLNB_COST_ALERT: "1.0"
      MLNB_COST_MISSED: "3.0"
      MLNB_CONTEXT_LIMIT_MINUTES: "90"
      MLNB_WAITING_LIMIT: "32"
      MLNB_REQUEST_SECONDS: "5"
      MLNB_LOG_KEEP_DAYS: "400"
      MLNB_LOG_FULL: serve
      MLNB_VERSIONS: /project/versions
      MLNB_KEYS_REQUIRED: "true"
    jobs:
      monitor:
        runs-on: ubuntu-latest
        steps:
          - run: mlnb outcomes add labels.parquet --outcome disrupted
          - run: mlnb outcomes status
          - run: mlnb compact
          - run: mlnb drift log --by day --segment origin=JFK --metrics drift.prom
          - run: mlnb performance --by day --segment origin --html performance.html
          - run: mlnb alerts check
          - run: mlnb alerts open 1 --again --print
          - run: |
              mlnb alerts ack 1 --by ci --note "seen by the job"
              mlnb alerts resolve 1 --by=ci
          - run: mlnb score requests.parquet scored.parquet --at 2013-07-01T05:00:00Z --log
          - run: mlnb runs prune --older 90 --yes
          - run: mlnb containerize --manifest --opt isolation=chroot
          - run: curl -s -X POST localhost:3000/outcomes -d @outcome.json
      smoke:
        runs-on: ubuntu-latest
        steps:
          - run: mlnb serve --plain --port 3001 &
          - run: mlnb serve --development --port 3002 &
"""

PROMETHEUS = """
    groups:
      - name: flight-delays
        rules:
          - {alert: Unlogged, expr: mlnb_unlogged > 0}
          - {alert: Unreadable, expr: mlnb_unreadable > 0}
          - {alert: Slow, expr: "histogram_quantile(0.99, rate(mlnb_request_seconds_bucket[5m])) > 0.25"}
          - {alert: Idle, expr: "rate(mlnb_rows_total[1h]) == 0"}
          - {alert: Stale, expr: mlnb_context_age_seconds > 5400}
          - {alert: Swapped, expr: 'mlnb_beside{what="swaps"} > 0 or mlnb_beside{what="refused"} > 0'}
          - {alert: Challenger, expr: 'mlnb_beside{what="challenger_failed"} > 0'}
          - {alert: Shadow, expr: 'mlnb_beside{what="shadow_dropped"} > mlnb_beside{what="shadow_scored"}'}
          - {alert: ShadowFails, expr: 'mlnb_beside{what="shadow_failed"} > 0'}
          - {alert: Drift, expr: "mlnb_drift_judged == 1 and mlnb_drift_times_over > 1 and mlnb_drift_rows > 1000"}
          - {alert: Score, expr: "abs(mlnb_drift_score_moved) > 0.05 and mlnb_drift_false_alarms_a_week < 1"}
          - {alert: NoDrift, expr: time() - mlnb_drift_written_seconds > 90000}
"""


def alert_notebook() -> dict:
    "The notebook of an alert of drift, as `mlnb alerts open` writes it before it is executed"
    from mlnb.monitoring.evidence import _identity, notebook_of

    at = dt.datetime(2026, 3, 1, 12)
    window = {
        "window": "2013-07-04",
        "since": "2013-07-04T00:00:00",
        "until": "2013-07-05T00:00:00",
        "version": "",
        "segment": "",
    }
    alert = {
        "id": 1, "project": "flight-delays", "rule": "inputs", "subject": "distance", "kind": "drift",
        "severity": "warning",
        "state": "firing", "words": "distance moved from the reference: PSI 0.41 on 2013-07-04", "value": 0.41,
        "bound": 0.25,
        "details": window | {"column": "distance", "statistic": "psi", "psi": 0.41}, "first_seen": at, "last_seen": at,
        "ended": None,
        "seen": 1, "missed": 0, "episode": 1,
    }  # fmt: skip
    notebook = notebook_of(alert)
    notebook["metadata"]["mlnb"] = {"alert": _identity(alert)}
    return notebook


def make_flight_delays(root: Path):
    from mlnb.project.template import new_project

    new_project(root.name, root.parent)
    file, settings = root / "pyproject.toml", dedent(SETTINGS).lstrip("\n")
    before, found, after = file.read_text().partition('bundle = "products/flight_delays/bundle"\n')
    assert found
    file.write_text(before + settings + after.split("\n", 1)[1])
    write(root / ".github/workflows/monitor.yml", MONITOR)
    write(root / "prometheus/alerts.yml", PROMETHEUS)
    write(root / "alerts/1.ipynb", json.dumps(alert_notebook(), indent=1) + "\n")


# --- what is kept -----------------------------------------------------------------------------------------------------


def tidy():
    "Remove what is of one process or one machine: locks, caches, the manifest of a plan, and the rest of a run"
    locks = (
        "**/watcher.lock",
        "**/gather",
        "**/*.lock",
        "**/__pycache__",
        "**/.ipynb_checkpoints",
        "planes/.mlnb/tasks/**/@*",
    )
    left = (
        "planes/.mlnb/records.db*",
        "planes/.mlnb/runs",
        "planes/.mlnb/stages",
        "planes/.mlnb/checkpoints",
        "service/products/v?",
    )
    for path in [path for pattern in (*locks, *left) for path in ROOT.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main(target: Path):
    ROOT.mkdir()
    here = os.uname()
    os.uname = lambda: os.uname_result((here.sysname, "host", *here[2:]))
    os.environ["MLNB_TRACK_RUNS"] = "false"
    try:
        make_service(ROOT / "service")
        make_scorecard(ROOT / "scorecard")
        make_planes(ROOT / "planes")
        make_flight_delays(ROOT / "flight-delays")
        tidy()
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(ROOT, target)
    finally:
        os.chdir("/")
        shutil.rmtree(ROOT)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
