"""`mlnb predictions` and `mlnb compact` as a user calls them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
import warm_cli
from test_compactor import DAMAGES, columns, ids_in_parquet, prediction
from waiting import is_alive, until

from mlnb.project.settings import load_settings
from mlnb.serving.predictions import PredictionLog


@pytest.fixture
def project(tmp_path):
    "A project with 30 predictions"
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    log = PredictionLog.of(load_settings(tmp_path))
    log.append([prediction(i, "v2" if i % 3 else "v1") for i in range(30)])
    log.close()
    return tmp_path


def environment():
    return {k: v for k, v in os.environ.items() if not k.startswith("MLNB_")}


def command(*arguments):
    return [sys.executable, "-m", "mlnb.cli.main", *arguments]


def mlnb(project, *arguments):
    return warm_cli.run(arguments, cwd=project, env=environment())


def test_a_question_before_and_after_compacting(project):
    ask = ("predictions", "--entity", "UA/7", "--json")
    before = json.loads(mlnb(project, *ask).stdout)
    assert mlnb(project, "compact").stdout == "30 rows of 1 file in 3 parts, 3 hours profiled\n"
    assert before == json.loads(mlnb(project, *ask).stdout)
    (row,) = before
    assert (row["request_id"], row["time"], row["distance"], row["probability"]) == (
        "r000007",
        "2013-07-01T01:07:00Z",
        1400,
        0.1 + 0.2,
    )
    assert json.loads(mlnb(project, "compact", "--json").stdout)["rows"] == 0
    assert "nothing to compact" in mlnb(project, "compact").stdout


def test_the_table_shows_the_newest(project):
    shown = mlnb(project, "predictions", "--limit", "3").stdout.splitlines()
    assert (
        shown[0].split()[:3] == ["time", "entity", "model_version"]
        and len(shown) == 4
        and "2013-07-01 02:29:00" in shown[3]
    )
    assert "No such prediction" in mlnb(project, "predictions", "--version", "v9").stdout


def test_files(project):
    said = mlnb(
        project, "predictions", "--since", "2013-07-01T01:00", "--until", "2013-07-01T02:00", "--output", "hour.parquet"
    ).stdout
    assert said == "10 predictions in hour.parquet\n" and len(pd.read_parquet(project / "hour.parquet")) == 10
    mlnb(project, "predictions", "--version", "v2", "--arm", "champion", "--limit", "4", "--output", "four.csv")
    assert (pd.read_csv(project / "four.csv")["model_version"] == "v2").tolist() == [True] * 4


def test_a_field_that_changed_its_type_is_text_in_a_file(project):
    log, row = PredictionLog.of(load_settings(project)), prediction(30, "v3")
    row.input = {"carrier": 7, "distance": "far"}
    log.append([row])
    log.close()
    assert mlnb(project, "predictions", "--output", "all.parquet").stdout == "31 predictions in all.parquet\n"
    found = pd.read_parquet(project / "all.parquet").set_index("request_id")["distance"]
    assert (found["r000029"], found["r000030"]) == ("1400", "far")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("predictions", "--until", ""), "until is '', which is not a time; write 2013-07-01"),
        (("performance", "--as-of", ""), "it is '', which is not a time; write 2013-07-01"),
        (("predictions", "--since", "soon"), "since is 'soon', which is not a time; write 2013-07-01"),
        (("predictions", "--output", "rows.xlsx"), "neither a .parquet nor a .csv file"),
        (("predictions", "--output", "pyproject.toml/rows.csv"), "pyproject.toml/rows.csv cannot be written"),
        (("compact", "--watch", "0"), "--watch"),
    ],
)
def test_mistakes_are_a_sentence(project, arguments, says):
    done = mlnb(project, *arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr and says in " ".join(done.stderr.split())


def test_a_setting_with_a_wrong_word(project):
    (project / "pyproject.toml").write_text('[tool.mlnb]\nlog_on_failure = "ignore"\n')
    done = mlnb(project, "compact")
    assert (
        done.returncode == 2
        and """setting 'log_on_failure' has value 'ignore'; write log_on_failure = "refuse" or "serve\""""
        in done.stderr
    )


def test_watching_until_ctrl_c(project):
    process = subprocess.Popen(
        command("compact", "--watch", "1"), cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "30 rows of 1 file in 3 parts, 3 hours profiled\n"
    log = PredictionLog.of(load_settings(project))
    log.append([prediction(30)])
    log.close()
    assert process.stdout.readline() == "1 row of 1 file in 1 part, 1 hour profiled\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0


def test_watching_goes_on_after_what_nobody_foresaw(project):
    odd = (
        project / ".mlnb/storage/predictions/version=v1/hour=2013-07-01T05/00000000-20130701T050000000000-00000.parquet"
    )
    odd.parent.mkdir(parents=True)
    odd.write_bytes(b"no Parquet")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command("compact", "--watch", "1"), cwd=project, env=environment(), **pipes, text=True)
    assert "ArrowInvalid" in (said := process.stderr.readline()) and "tried again in 1 second" in said
    odd.unlink()
    assert process.stdout.readline() == "3 hours profiled\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0


def test_damaged_columns_end_no_command(project, fixed_clock):
    log = PredictionLog.of(load_settings(project))
    for numbers in (range(30, 50), range(50, 70)):
        log.append_table(columns(numbers))
    log.close()
    (file,) = (project / ".mlnb/predictions").glob("*.arrows")
    file.write_bytes(DAMAGES["far away"](file.read_bytes()))
    said = "1 line or table was served and cannot be read back from the prediction log"
    for _ in range(2):  # before and after the compactor has set it aside
        shown = mlnb(project, "predictions", "--limit", "90", "--json")
        assert len(json.loads(shown.stdout)) == 50 and (shown.returncode, said in shown.stderr) == (1, True)
        (finding,) = (
            f for f in json.loads(mlnb(project, "doctor", "--json").stdout)["findings"] if f["item"] == "Prediction log"
        )
        assert finding["state"] == "missing" and said in finding["detail"] and "damaged away" in finding["fix"]
        done = mlnb(project, "compact")
        assert ("1 damaged piece quarantined" in done.stdout, said in done.stderr) == (
            (True, True) if done.returncode else (False, False)
        )
    shutil.rmtree(project / ".mlnb/predictions/damaged")
    assert mlnb(project, "predictions").returncode == 0


def test_what_a_killed_writer_left_was_not_answered(project):
    (file,) = (project / ".mlnb/predictions").glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-9])
    done = mlnb(project, "compact")
    assert "1 damaged piece quarantined" in done.stdout and (done.returncode, done.stderr) == (0, "")
    assert mlnb(project, "predictions").returncode == 0


BESIDE = """
import sys, time
from mlnb.project.settings import load_settings
from mlnb.serving.compactor import start_background_compactor
print(start_background_compactor(load_settings()).pid, flush=True)
time.sleep(3600)
"""


def test_beside_a_service_it_ends_with_it(project):
    service = subprocess.Popen(
        [sys.executable, "-c", BESIDE], cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    )
    pid = int(service.stdout.readline())
    until(lambda: len(ids_in_parquet(project / ".mlnb/storage/predictions")) == 30)
    service.kill()
    service.wait()
    until(lambda: not is_alive(pid))


def test_no_compactor_where_the_setting_says_so(project):
    from mlnb.serving.compactor import start_background_compactor

    (project / "pyproject.toml").write_text("[tool.mlnb]\nlog_compact_minutes = 0\n")
    assert start_background_compactor(load_settings(project)) is None


@pytest.mark.parametrize("compacted", [False, True])
def test_a_misspelt_filter_is_told_as_one(project, compacted):
    if compacted:
        mlnb(project, "compact")
    assert "it has v1, v2" in mlnb(project, "predictions", "--version", "v9").stdout
    assert (
        mlnb(project, "predictions", "--version", "v2", "--entity", "none").stdout
        == "No such prediction is in the log.\n"
    )
    wrong = {
        ("predictions", "--arm", "champoin"): (2, "'champoin' is not one of 'champion', 'challenger', 'shadow'"),
        ("predictions", "--since", "2013-08-01", "--until", "2013-07-01"): (
            1,
            "since 2013-08-01T00:00:00 is after until 2013-07-01",
        ),
        ("drift", "log", "--arm", "nope", "--reference", "log"): (1, "has no rows of arm nope; it has arms champion"),
        ("drift", "log", "--version", "nope", "--reference", "log"): (
            1,
            "has no rows of version nope; it has versions v1, v2",
        ),
    }
    for words, (code, says) in wrong.items():
        done = mlnb(project, *words)
        assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_segment_that_no_prediction_has_is_named(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path / "toy")
    file = root / "pyproject.toml"
    file.write_text(file.read_text() + 'profile_segments = ["orign", "origin", "hour", "arm"]\n')
    done = mlnb(root, "compact")
    assert (
        done.returncode == 0
        and done.stderr.count("profile_segments") == 1
        and "'orign' (did you mean 'origin'?)" in done.stderr
    )
