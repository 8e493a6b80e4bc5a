import json
import shutil
import subprocess

import pyarrow.parquet as pq
import pytest
import toy_project
from test_bento import MLNB, mlnb
from test_cli_serve import refused
from test_scoring import many, parquet, text

from mlnb.models.bundle import Bundle
from mlnb.serving.log_reader import read_predictions


@pytest.fixture
def project(toy, tmp_path):
    "A project with 30 rows to score, of which the last is wrong"
    root = shutil.copytree(toy, tmp_path / "project")
    rows = many(Bundle.load(root / "products/bundle").samples["requests"], 29)
    parquet(root / "in.parquet", [*rows, rows[0] | {"distance": None}])
    text(root / "in.csv", rows)
    return root


def test_scoring_a_file(project):
    done = mlnb(project, "score", "in.parquet", "scores/out.parquet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Scored 29 rows with model toy v1 in ") and "scores/out.parquet\n" in done.stdout
    assert "1 of 30 rows were quarantined; the reasons are in scores/out.rejected.parquet" in done.stdout
    assert done.stdout.endswith("the first is row 29, field 'distance': is missing\n")
    assert pq.read_metadata(project / "scores/out.parquet").num_rows == 29
    refused(
        mlnb(project, "score", "in.parquet", "scores/out.parquet"), "scores/out.parquet exists already", "--overwrite"
    )
    assert mlnb(project, "score", "in.csv", "scores/out.parquet", "--overwrite").returncode == 0
    assert [p.name for p in (project / "scores").iterdir()] == ["out.parquet"]


def test_a_document_for_a_program(project):
    done = mlnb(project, "score", "in.parquet", "out.csv", "--json", "--log")
    told = json.loads(done.stdout)
    assert (told["rows"], told["rejected"], told["rejected_file"], told["model_version"]) == (
        30,
        1,
        "out.rejected.csv",
        "v1",
    )
    assert len(read_predictions(project / ".mlnb/predictions")) == 29


def test_where_no_row_is_good_the_command_fails(project):
    rows = pq.read_table(project / "in.parquet").slice(29)
    pq.write_table(rows, project / "wrong.parquet")
    done = mlnb(project, "score", "wrong.parquet", "out.parquet", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["rejected"] == 1
    pq.write_table(rows.slice(1), project / "none.parquet")
    assert mlnb(project, "score", "none.parquet", "none.csv").returncode == 0


def test_strict(project):
    refused(mlnb(project, "score", "in.parquet", "out.parquet", "--strict"), "row 29, field 'distance': is missing")
    assert not (project / "out.parquet").exists()
    assert mlnb(project, "score", "in.csv", "out.parquet", "--strict").returncode == 0


def test_a_context_that_cannot_be_read(project):
    environment = toy_project.environment(project) | {"MLNB_STORAGE": str(project / "in.csv")}
    done = subprocess.run(
        [*MLNB, "score", "in.csv", "out.csv"], cwd=project, env=environment, capture_output=True, text=True
    )
    refused(done, "the point-in-time features cannot be read: ", "Not a directory", "in.csv/context", "or MLNB_STORAGE")
    assert not (project / "out.csv").exists()


def test_wrong_calls(project, tmp_path):
    refused(mlnb(project, "score", "none.csv", "out.csv"), "there is no file none.csv")
    refused(
        mlnb(project, "score", "in.csv", "out.json"),
        "out.json cannot be written; its name must end in .parquet or .csv",
    )
    refused(
        mlnb(project, "score", "in.xlsx", "out.csv"), "in.xlsx cannot be read; its name must end in .parquet or .csv"
    )
    refused(
        mlnb(project, "score", "in.csv", "out.csv", "--decision-time", "yesterday"),
        "'yesterday' is not a time with an offset",
    )
    refused(
        mlnb(project, "score", "in.csv", "out.csv", "--decision-time", "2013-07-01T05:00:00Z"),
        "has a column 'decision_time'",
    )
    refused(mlnb(project, "score", "in.csv", "out.csv", "--bundle", str(tmp_path)), "no model bundle in")
    refused(mlnb(tmp_path, "score", "in.csv", "out.csv"), "no project at or above")
    (project / "in.csv").write_text("carrier;flight\nUA;1\n")
    refused(
        mlnb(project, "score", "in.csv", "out.csv"), "in.csv has no column 'carrier'", "the model needs carrier, flight"
    )
