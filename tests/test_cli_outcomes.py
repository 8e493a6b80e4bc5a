"""`mlnb labels` and `mlnb performance` as a user calls them: bad files, kills, corrections, and what is printed."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import toy_project
import warm_cli

from mlnb.serving.labels import EXPECTED_FORMS, LabelStore, current_labels
from mlnb.serving.predictions import Prediction, PredictionLog

ROWS, MLNB = 480, (sys.executable, "-c", "from mlnb.cli.main import main; main()")


def moment(text):
    return f"{np.datetime_as_string(text, 's')}Z"


def prediction(entity, time, q, input):
    answer = {"probability": q, "decision": q >= 1 / 3}
    return Prediction(f"r-{entity}", entity, time, time, "v1", "champion", "", 1.0, answer, input, {})


@pytest.fixture
def project(tmp_path):
    "A project with a prediction log of twenty days, and a file with the outcome of each"
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\ncost_false_negative = 3.0\n")
    rng = np.random.default_rng(0)
    times, p = np.datetime64("2013-07-01T00:30") + np.arange(ROWS) * np.timedelta64(1, "h"), rng.beta(1.5, 4, ROWS)

    made = lambda i, time, q: prediction(f"e{i}", moment(time), q, {"origin": "JFK" if i % 3 else "EWR"})
    PredictionLog(tmp_path / ".mlnb/predictions").append(
        [made(i, t, q) for i, (t, q) in enumerate(zip(times, p.tolist(), strict=True))]
    )
    labels = pd.DataFrame({"entity": [f"e{i}" for i in range(ROWS)], "value": (rng.random(ROWS) < p).astype(int)})
    labels["observed_at"] = pd.Series(times + np.timedelta64(5, "h")).dt.tz_localize("UTC")
    labels.to_parquet(tmp_path / "labels.parquet", index=False)
    return tmp_path


def mlnb(project, *words, code=0, **variables):
    env = toy_project.environment(project) | variables
    done = warm_cli.run(words, cwd=project, env=env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def added(project, *words) -> dict:
    return json.loads(mlnb(project, "labels", "add", *words, "--json"))


def counts(result: dict) -> tuple:
    return tuple(result[name] for name in ("rows", "added", "duplicates", "unknown", "rejected"))


def test_a_file_is_kept_once_and_then_judged(project):
    assert "480 of 480 rows" in mlnb(project, "labels", "add", "labels.parquet")
    assert counts(added(project, "labels.parquet")) == (480, 0, 480, 0, 0)
    result = json.loads(mlnb(project, "performance", "--group-by", "origin", "--json"))
    assert result["overall"]["coverage"] == 1 and result["overall"]["decisions"] == ROWS and len(result["days"]) == 20
    assert {s["name"]: s["decisions"] for s in result["segments"]} == {"JFK": 320, "EWR": 160}
    low, high = result["overall"]["interval"]["cost_per_1000"]
    assert low < result["overall"]["realised"]["cost_per_1000"] < high
    assert result["interval"]["seed"] == 0 and "concept drift" in result["assumption"]
    shown = mlnb(project, "performance", "--window", "day", "--html", "page.html")
    assert "Page: page.html" in shown and "<circle" in (project / "page.html").read_text()
    assert "did you mean 'origin'" in mlnb(project, "performance", "--group-by", "orign", code=1)
    assert "cannot be written" in mlnb(project, "performance", "--html", "labels.parquet/page.html", code=2)
    assert "2013-07-20" in shown and "100.0%" in shown and "expected" in shown


def test_segments_that_are_not_shown_are_told(project):
    log = [prediction(f"t{i}", "2013-07-01T05:00:00Z", 0.5, {"tail": f"N{i % 30}"}) for i in range(90)]
    PredictionLog(project / ".mlnb/predictions").append(log)
    output = "tail has 31 values; the 20 with the most decisions are shown"
    assert (
        output in mlnb(project, "performance", "--group-by", "tail", "--html", "page.html")
        and output in (project / "page.html").read_text()
    )
    result = json.loads(mlnb(project, "performance", "--group-by", "tail", "--json"))
    assert (result["segment_count"], len(result["segments"])) == (31, 20)  # one is that of the rows without a tail
    assert "are shown" not in mlnb(project, "performance", "--group-by", "origin")


def test_at_an_earlier_moment_days_wait(project):
    added(project, "labels.parquet")
    shown = mlnb(project, "performance", "--as-of", "2013-07-10T12:00", "--window", "day")
    days = {line.split()[0]: line for line in shown.splitlines() if line.startswith("2013-07-")}
    assert len(days) == 10 and [day for day, line in days.items() if "waiting for labels" in line] == [
        "2013-07-09",
        "2013-07-10",
    ]
    early = mlnb(project, "performance", "--as-of", "2013-07-01T12:00")
    assert "No day's label window has closed" in early


def test_without_outcomes_the_command_says_how_to_add_some(project):
    assert "mlnb labels add FILE" in mlnb(project, "performance")
    assert "mlnb labels add FILE" in mlnb(project, "labels", "status")


def test_no_prediction_no_cost_no_such_time(project, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "pyproject.toml").write_text("[tool.mlnb]\n")
    assert "cost_false_negative = 3.0" in mlnb(empty, "performance", code=1)
    assert "has no rows; serve the model first with: mlnb serve" in mlnb(
        empty, "performance", code=1, MLNB_COST_FALSE_NEGATIVE="3.0"
    )
    assert "mlnb predictions" in mlnb(project, "performance", "--since", "2014-01-01", code=1)
    assert "positive 1.0 and false_negative 0.5" in mlnb(project, "performance", code=1, MLNB_COST_FALSE_NEGATIVE="0.5")
    assert "cost_false_negative" in mlnb(project, "performance", code=2, MLNB_COST_FALSE_NEGATIVE="dear")
    assert "is not a time" in mlnb(project, "performance", "--as-of", "tomorrow", code=2)


def test_wrong_rows_are_set_aside_and_the_good_ones_kept(project):
    future, past = "2100-01-01T00:00:00Z", "2013-06-01T00:00:00Z"
    good = "2013-07-01T12:00:00Z"
    rows = [
        ("e0", "1", good),
        ("e0", "1", good),
        ("new", "0", good),
        ("e1", "2", good),
        ("e2", "0.5", good),
        ("e3", "", good),
    ]
    rows += [("e4", "yes", good), ("e5", "1", future), ("e6", "1", past), ("e7", "1", "2013-07-01"), ("e8", "1", "")]
    rows += [("", "1", good), ("x" * 1_000_000, "1", good)]
    (project / "bad.csv").write_text(
        "\n".join(["entity,value,observed_at", *(",".join(r) for r in rows), "e9,1"]) + "\n"
    )
    result = added(project, "bad.csv")
    assert counts(result) == (14, 2, 1, 1, 11)
    aside = pd.read_csv(project / "bad.rejected.csv")
    assert aside["row"].tolist() == list(range(3, 14)) and result["rejected_file"] == "bad.rejected.csv"
    assert {"is in the future", "is before the decision on this entity", "2 is neither 0 nor 1", "is not a key"} <= set(
        aside["problem"]
    )
    output = mlnb(project, "labels", "add", "bad.csv")
    assert (
        "11 were quarantined; the reasons are in bad.rejected.csv" in output
        and "row 3, field 'value': 2 is neither 0 nor 1; write 0 or 1" in output
    )
    (project / "bad.csv").write_text(f"entity,value,observed_at\ne0,1,{good}\n")
    assert counts(added(project, "bad.csv")) == (1, 0, 1, 0, 0) and not (project / "bad.rejected.csv").exists()


def test_where_no_row_is_good_the_command_fails_and_a_word_is_no_label(project):
    (project / "words.csv").write_text("entity,value,observed_at\ne0,yes,2013-07-01T12:00:00Z\n")
    done = subprocess.run(
        [*MLNB, "labels", "add", "words.csv"], cwd=project, env=toy_project.environment(project), capture_output=True
    )
    assert done.returncode == 1 and b"the first is row 0, field 'value': \"yes\" is neither 0 nor 1" in done.stdout
    assert pd.read_csv(project / "words.rejected.csv")["expected"].tolist() == [EXPECTED_FORMS["value"]]
    (project / "words.csv").write_text("entity,value,observed_at\n")
    assert counts(added(project, "words.csv")) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.rename(columns={"value": "valeu"}), "no column 'value' (did you mean 'valeu'?)"),
        (lambda t: t.rename(columns={"entity": "key"}), "there is no bundle"),
        (lambda t: t.assign(observed_at=t.observed_at.dt.tz_localize(None)), "times with their zone"),
        (lambda t: t.assign(value="yes"), "column 'value' has type"),
        (lambda t: t.assign(entity=range(len(t))), "write it as text"),
    ],
)
def test_a_file_that_has_not_the_columns_is_refused(project, change, expected):
    change(pd.read_parquet(project / "labels.parquet")).to_parquet(project / "other.parquet", index=False)
    assert expected in mlnb(project, "labels", "add", "other.parquet", code=1)
    assert not (project / ".mlnb/storage/outcomes").exists()


def test_columns_have_other_names_truth_values_and_no_moment(project):
    labels = pd.read_parquet(project / "labels.parquet")
    named = pd.DataFrame({"key": labels.entity, "late": labels.value == 1, "known": labels.observed_at})
    named.to_parquet(project / "named.parquet", index=False)
    assert (
        counts(added(project, "named.parquet", "--entity", "key", "--label", "late", "--observed", "known"))[1] == ROWS
    )
    assert counts(added(project, "labels.parquet"))[2] == ROWS
    file = project / "undated.csv"
    other = 1 - float(labels.value[labels.entity == "e0"].iloc[0])
    file.write_text(f"entity,value\ne0,{other:g}\n")
    os.utime(file, (1_300_000_000, 1_300_000_000))  # older than the answers
    assert added(project, file)["added"] == 1 and added(project, file)["duplicates"] == 1
    shown = json.loads(mlnb(project, "labels", "show", "e0", "--json"))
    assert shown[-1]["observed_at"] == shown[-1]["received_at"] and len(shown) == 2
    assert shown[-1] == shown[-1] | {"value": other, "source": "undated.csv"}


def test_a_correction_holds_and_the_history_is_shown(project):
    added(project, "labels.parquet")
    before = json.loads(mlnb(project, "labels", "show", "e7", "--json"))[0]["value"]
    (project / "fix.csv").write_text(f"entity,value,observed_at\ne7,{1 - before:g},2013-07-09T00:00:00Z\n")
    added(project, "fix.csv")
    assert f"{1 - before:g}  observed at 2013-07-09T00:00:00Z" in mlnb(project, "labels", "show", "e7").splitlines()[-1]
    assert "1 corrections" in mlnb(project, "labels", "status")
    assert "'nobody' has no label" in mlnb(project, "labels", "show", "nobody")


def test_lines_that_cannot_be_read_are_told(project):
    added(project, "labels.parquet")
    assert "quarantined" not in mlnb(project, "labels", "status")
    (project / ".mlnb/outcomes/20130701T000000-1-00000000.jsonl").write_text(
        '{"entity": "of another release"}\n{"entity": "torn'
    )
    mlnb(project, "compact")
    assert json.loads(mlnb(project, "labels", "status", "--json"))["damaged_lines"] == 2
    assert "2 lines that could not be read are quarantined in" in mlnb(project, "labels", "status")


def test_the_entitys_own_fields_make_the_key(toy, tmp_path):
    rows = [toy_project.example(toy, flight=100), toy_project.example(toy, flight=101)]
    table = pd.DataFrame(rows).assign(value=[1, 0], observed_at="2013-07-02T00:00:00Z")
    table.to_csv(tmp_path / "labels.csv", index=False)
    where = {
        "MLNB_STORAGE": str(tmp_path / "storage"),
        "MLNB_LABELS": str(tmp_path / "lines"),
        "MLNB_PREDICTIONS": str(tmp_path / "log"),
    }
    result = json.loads(mlnb(toy, "labels", "add", tmp_path / "labels.csv", "--json", **where))
    assert counts(result) == (2, 2, 0, 2, 0)
    held = current_labels(LabelStore(tmp_path / "lines", str(tmp_path / "storage/outcomes")).read())[
        "entity"
    ].to_pylist()
    assert held == ["UA/100/JFK/2013-07-01T05:00:00Z", "UA/101/JFK/2013-07-01T05:00:00Z"]
    table.drop(columns="origin").to_csv(tmp_path / "labels.csv", index=False)
    assert "no column 'origin'" in mlnb(toy, "labels", "add", tmp_path / "labels.csv", code=1, **where)


def test_killed_half_way_and_two_at_once_each_row_is_there_once(project):
    n = 300_000
    table = pd.DataFrame({"entity": [f"x{i}" for i in range(n)], "value": np.arange(n) % 2})
    table.assign(observed_at=pd.Timestamp("2013-07-02", tz="UTC")).to_parquet(project / "many.parquet", index=False)
    store = LabelStore(project / ".mlnb/outcomes", str(project / ".mlnb/storage/outcomes"))
    command, place = [*MLNB, "labels", "add", "many.parquet"], {"cwd": project, "env": toy_project.environment(project)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **place)
    while process.poll() is None and not store.parts():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = current_labels(store.read()).num_rows
    assert 0 < kept <= n
    both = [subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, **place) for _ in range(2)]
    told = [json.loads(p.communicate(timeout=600)[0]) for p in both]
    assert all(t["added"] + t["duplicates"] == n for t in told)
    assert current_labels(store.read()).num_rows == n and counts(added(project, "many.parquet"))[2] == n
    assert not list(project.glob(".many*"))


def test_a_file_that_cannot_be_read_or_written_is_said(project):
    (project / "torn.parquet").write_bytes((project / "labels.parquet").read_bytes()[:500])
    assert "cannot be read" in mlnb(project, "labels", "add", "torn.parquet", code=1)
    assert "no file none.parquet" in mlnb(project, "labels", "add", "none.parquet", code=1)
    (project / ".mlnb/storage").parent.mkdir(exist_ok=True)
    (project / "full").write_text("a file, not a folder")
    assert "cannot be stored" in mlnb(
        project, "labels", "add", "labels.parquet", code=1, MLNB_STORAGE=str(project / "full")
    )


def test_the_newest_outcome_is_received_now(project):
    before = datetime.now(UTC)
    added(project, "labels.parquet")
    (file, *_) = (project / ".mlnb/storage/outcomes").glob("*.parquet")
    assert before <= pq.read_table(file)["received_at"][0].as_py() <= datetime.now(UTC)
