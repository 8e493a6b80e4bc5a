"""From a table to the first answer: `mlnb new NAME --from TABLE`, `mlnb run`, `mlnb serve`, the curl of the README.

Three parts: a CSV of the features of the reference project (seconds, CPU seconds, and AUC on its split), the raw
flights with three targets (which columns are used), and tables that ship inside installed packages (each runs, and is
better than its first baseline wherever plain gradient boosting is). No table is edited, no option depends on a name.
"""

import needs

needs.packages()

import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import psutil
from report import arguments, at_most, finish, row

FEATURES = Path(__file__).parents[1] / "products" / "flights" / "features.parquet"
SCORES = FEATURES.with_name("scores.json")
MAX_SECONDS, MAX_AUC_LOSS = 180, 0.02
UNKNOWN = {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "tailnum"}


def environment() -> dict[str, str]:
    """Variables of the commands, without settings of this process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {k: v for k, v in os.environ.items() if not k.startswith("MLNB_")} | {"PATH": path}


def run(*words: str, cwd: Path) -> str:
    """A command that has to succeed."""
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


@contextmanager
def service(project: Path, port: int):
    """The service of the project, ended at the end."""
    command = ["mlnb", "serve", "--no-bento", "--port", str(port)]
    process = subprocess.Popen(command, cwd=project, env=environment(), stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def first_answer(project: Path, port: int = 3999) -> dict:
    """The answer to the curl that stands in the README, asked until the service is there."""
    request = re.search(r"/predict .*? -d '(.*)'$", (project / "README.md").read_text(), re.MULTILINE)
    body = request[1].replace("'\"'\"'", "'").encode()
    with service(project, port):
        for _ in range(600):
            try:
                answer = httpx.post(f"http://127.0.0.1:{port}/predict", content=body, timeout=30)
                return answer.raise_for_status().json()
            except httpx.TransportError:
                time.sleep(0.1)
    raise SystemExit("the service gave no answer")


def new(folder: Path, name: str, table: Path, target: str, *options: str) -> Path:
    """The project of a table."""
    run("mlnb", "new", name, "--from", str(table), "--target", target, *options, cwd=folder)
    return folder / name


def used_columns(project: Path) -> set[str]:
    """The columns of the table that the model gets."""
    code = f"from {project.name}.contract import NAMES; print(*NAMES)"
    return set(run(sys.executable, "-c", code, cwd=project).split())


def cpu_seconds() -> float:
    """Of all children that have ended, and of the kernels that the fork servers of this interpreter have started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = usage.ru_utime + usage.ru_stime
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        command = process.info["cmdline"] or []
        if command[:1] == [sys.executable] and "forkserver.py" in " ".join(command):
            total += sum(process.info["cpu_times"][:4])
    return total


def reference_project(folder: Path) -> list[dict]:
    """Seconds from the CSV to the first answer, and the AUC on the split of the reference project."""
    table = folder / "features.csv"
    pd.read_parquet(FEATURES).to_csv(table, index=False)
    started, cpu = time.perf_counter(), cpu_seconds()
    project = new(folder, "late", table, "disrupted", "--time", "decision_time")
    run("mlnb", "run", cwd=project)
    first_answer(project)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    dates = ("--param", "train_end=2013-06-01", "--param", "valid_end=2013-07-01")
    run("mlnb", "run", *dates, "evaluate", cwd=project)
    auc = json.loads((project / "products/scores.json").read_text())["LightGBM"]["auc"]
    reference = json.loads(SCORES.read_text())["models"]["tabular network"]["overall"]["auc"]
    name = f"336,776 rows of CSV to the first answer, seconds ({cpu:.0f} CPU-s)"
    least = reference - MAX_AUC_LOSS
    same_split = row("AUC of that project on the split of the reference project", auc, f"at least {least:.3f}",
                     auc >= least, reference, auc / reference)  # fmt: skip
    return [at_most(name, seconds, MAX_SECONDS), same_split]


def raw_flights(folder: Path) -> list[dict]:
    """Which columns of the raw flights are used for three targets."""
    from mlnb.flights.ingest import read_raw

    flights, rows = read_raw("flights"), []
    targets = {
        "late": (flights["arr_delay"] > 15) | flights["arr_delay"].isna(),
        "cancelled": flights["dep_time"].isna(),
        "delay": flights["arr_delay"],
    }
    for target, values in targets.items():
        table = folder / f"raw_{target}.parquet"
        flights.assign(**{target: values}).to_parquet(table)
        used = used_columns(new(folder, f"raw_{target}", table, target)) & UNKNOWN
        name = f"raw flights, target {target}: columns used that are known only afterwards"
        rows.append(at_most(name, len(used), 0))
    return rows


def read_arff(file: Path) -> pd.DataFrame:
    """A compressed ARFF file of scikit-learn's tests."""
    import csv

    head, _, data = gzip.decompress(file.read_bytes()).decode().replace("@DATA", "@data").partition("@data\n")
    names = re.findall(r"^@attribute\s+('[^']*'|\S+)", head, re.MULTILINE | re.IGNORECASE)
    rows = csv.reader(data.splitlines(), quotechar='"' if '"' in data else "'", skipinitialspace=True)
    complete = [r for r in rows if len(r) == len(names)]
    frame = pd.DataFrame(complete, columns=[n.strip("'") for n in names]).replace("?", None)
    for name in frame:
        numbers = pd.to_numeric(frame[name], errors="coerce")
        frame[name] = numbers if numbers.notna().sum() == frame[name].notna().sum() else frame[name]
    return frame


def package_tables() -> dict[str, tuple[pd.DataFrame, str]]:
    """Name -> a table that ships inside an installed package, and its target."""
    import sklearn
    from sklearn import datasets

    from mlnb.flights.ingest import read_raw

    openml = Path(sklearn.__file__).parent / "datasets/tests/data/openml"
    arff = lambda number: read_arff(next((openml / f"id_{number}").glob("data-v1*.arff.gz")))
    frame = lambda load: load(as_frame=True).frame
    return {
        "iris": (frame(datasets.load_iris), "target"),
        "wine": (frame(datasets.load_wine), "target"),
        "digits": (frame(datasets.load_digits), "target"),
        "cancer": (frame(datasets.load_breast_cancer), "target"),
        "diabetes": (frame(datasets.load_diabetes), "target"),
        "titanic": (arff(40945), "survived"),
        "cpu": (arff(561), "class"),
        "penguins": (arff(42585), "species"),
        "chess": (arff(3), "class"),
        "planes": (read_raw("planes"), "engine"),
        "weather": (read_raw("weather"), "wind_speed"),
    }


def plain_boosting(table: pd.DataFrame, target: str) -> tuple[float, float]:
    """Loss on the test rows of a project's table: of the first baseline, and of scikit-learn's gradient boosting."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.metrics import log_loss, root_mean_squared_error

    features = table.drop(columns=[target, "split"]).apply(
        lambda c: c.astype("int64") if c.dtype.kind == "M" else c if c.dtype.kind in "ifub" else pd.factorize(c)[0]
    )
    test = table["split"] == "test"
    y, truth = table.loc[~test, target], table.loc[test, target]
    if table[target].dtype.kind == "f":
        predicted = HistGradientBoostingRegressor(random_state=0).fit(features[~test], y).predict(features[test])
        median = np.full(len(truth), y.median())
        return root_mean_squared_error(truth, median), root_mean_squared_error(truth, predicted)
    model = HistGradientBoostingClassifier(random_state=0).fit(features[~test], y)
    shares = y.value_counts(normalize=True)[list(model.classes_)].to_numpy()
    loss = lambda p: log_loss(truth, p, labels=list(model.classes_))
    return loss(np.tile(shares, (len(truth), 1))), loss(model.predict_proba(features[test]))


def package_table(folder: Path, name: str, frame: pd.DataFrame, target: str) -> dict:
    """One row of the table: the loss of the project's model over that of its first baseline."""
    file = folder / f"{name}.csv"
    frame.to_csv(file, index=False)
    project = new(folder, f"{name}_model", file, target)
    run("mlnb", "run", cwd=project)
    first_answer(project)
    table = pd.read_parquet(project / "products/table.parquet")
    baseline, plain = plain_boosting(table, table.columns[-2])  # the last ones are target and split
    scores = list(json.loads((project / "products/scores.json").read_text()).values())
    metric = "log_loss" if "log_loss" in scores[0] else "rmse"
    ours, first = scores[-1][metric], scores[0][metric]
    title = f"{name} ({len(frame)} rows): {metric} beside plain boosting"
    holds = ours < first or plain >= baseline
    return row(title, ours, f"below {first:.3g}", holds, plain, plain / ours)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="names of tables of packages, or features, raw; separated by commas")
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    folder, results = Path(tempfile.mkdtemp(prefix="from-table-")), []
    try:
        if not only or "features" in only:
            needs.products()
            results += reference_project(folder)
        if not only or "raw" in only:
            results += raw_flights(folder)
        for name, (frame, target) in package_tables().items():
            if not only or name in only:
                results.append(package_table(folder, name, frame, target))
                print(results[-1], file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    finish(results, options.json)


if __name__ == "__main__":
    main()
