"""`mlnb drift` as a user calls it: a process, its two outputs and its exit code."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import warm_cli

from mlnb.data.profiles import Profile


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project with a reference and a table of three later months"
    root = tmp_path_factory.mktemp("project")
    (root / "pyproject.toml").write_text("[tool.mlnb]\n")
    rng = np.random.default_rng(0)

    def rows(start, end, mean):
        times = pd.date_range(start, end, freq="15min", inclusive="left")
        return pd.DataFrame(
            {
                "decision_time": times,
                "month": times.month,
                "temperature": rng.normal(mean, 10, len(times)),
                "carrier": rng.choice(["UA", "DL", "B6"], len(times)),
                "[red]odd": rng.random(len(times)),
            }
        )

    Profile.of(rows("2013-01-01", "2013-06-01", 40)).write(root / "products/bundle/reference.profile")
    later = pd.concat(
        [
            rows("2013-07-01", "2013-08-01", 80),
            rows("2013-08-01", "2013-09-01", 75),
            rows("2013-09-01", "2013-10-01", 42),
        ]
    )
    later.to_parquet(root / "later.parquet")
    return root


def mlnb(project, *arguments):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLNB_")}
    return warm_cli.run(["drift", *arguments], cwd=project, env=environ)


def test_json_is_one_document_and_nothing_else(project):
    done = mlnb(project, "later.parquet", "--window", "month", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["reference"]["rows"] == 151 * 96
    assert [w["window"] for w in document["windows"]] == ["2013-07", "2013-08", "2013-09"]
    levels = {(w["window"], c["name"]): c["level"] for w in document["windows"] for c in w["columns"]}
    assert levels["2013-07", "temperature"] == "large" and levels["2013-07", "carrier"] == "none"
    assert document["left_out"] == ["decision_time", "month"]


def test_tables(project):
    months = mlnb(project, "later.parquet", "--window", "month").stdout
    assert "2013-07" in months and "temperature" in months and "[red]odd" in months and "slight from 0.05" in months
    assert "Left out, since they drift by construction: decision_time, month." in months
    days = mlnb(project, "later.parquet", "--window", "day").stdout
    assert "█" in days or "?" in days
    assert "noise" in mlnb(project, "later.parquet").stdout


def test_a_table_against_a_table(project):
    done = mlnb(project, "later.parquet", "--reference", "later.parquet", "--json")
    assert {c["psi"] for c in json.loads(done.stdout)["windows"][0]["columns"]} == {0.0}


def test_the_same_rows_as_csv_have_not_moved(project, tmp_path):
    codes = pd.DataFrame({"code": ["05", "10", "NA", None] * 500})
    codes.to_parquet(tmp_path / "codes.parquet")
    codes.to_csv(tmp_path / "codes.csv", index=False)
    done = mlnb(project, str(tmp_path / "codes.csv"), "--reference", str(tmp_path / "codes.parquet"), "--json")
    assert [c["psi"] for c in json.loads(done.stdout)["windows"][0]["columns"]] == [0.0]


def test_long_names_and_many_windows_fit_the_screen(project, tmp_path):
    long = pd.read_parquet(project / "later.parquet").rename(columns={"temperature": "t" * 200})
    long.to_parquet(tmp_path / "long.parquet")
    done = mlnb(
        project, str(tmp_path / "long.parquet"), "--reference", str(tmp_path / "long.parquet"), "--window", "day"
    )
    assert (
        done.returncode == 0
        and "t" * 40 in done.stdout
        and max(map(len, done.stdout.split("Reference:")[0].splitlines())) <= 120
    )
    assert (
        "Older windows that are not shown: 34;" in done.stdout
    )  # of 92, in the half of the screen that the name leaves
    few = mlnb(project, "later.parquet", "--window", "day")
    assert "Older windows" not in few.stdout


def test_columns_and_limit(project):
    chosen = json.loads(mlnb(project, "later.parquet", "--column", "carrier", "--column", "month", "--json").stdout)
    assert {c["name"] for c in chosen["windows"][0]["columns"]} == {"carrier", "month"}
    few = mlnb(project, "later.parquet", "--limit", "1").stdout
    assert "1 of 3 columns are shown" in few


def test_the_page(project, tmp_path):
    done = mlnb(project, "later.parquet", "--window", "month", "--html", str(tmp_path / "drift.html"), "--json")
    json.loads(done.stdout)
    assert (tmp_path / "drift.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        (["nowhere.parquet"], 1, "there is no file"),
        (["log"], 1, "mlnb serve"),
        (["log:july"], 1, "is not a period"),
        (["log:2013-13"], 1, "is not a period"),
        (["log:2013-02-30", "--where", "carrier=UA", "--reference", "later.parquet"], 1, "is not a period"),
        (["later.parquet", "--metrics", "no/such/folder/x.prom"], 2, "folder no/such/folder does not exist"),
        (["bundle", "--window", "day"], 1, "cannot be split"),
        (["later.parquet", "--column", "temprature"], 1, "did you mean 'temperature'?"),
        (["later.parquet", "--window", "year"], 2, "'year' is not one of"),
        (["later.parquet", "--window", "day", "--time", "carrier"], 1, "cannot be read as times"),
        (["later.parquet", "--limit", "0"], 2, "0 is not in the range"),
        ([], 2, "Missing argument"),
    ],
)
def test_a_mistake_is_one_sentence(project, arguments, code, output):
    done = mlnb(project, *arguments)
    assert done.returncode == code and output in done.stderr and done.stdout == "" and "Traceback" not in done.stderr


def test_help_imports_nothing_heavy(project):
    heavy = {"pandas", "whylogs", "whylogs_sketching", "numpy"}
    code = f"import sys; from mlnb.cli.drift import drift; print({heavy} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
    assert "Example:" in mlnb(project, "--help").stdout
