"""The command line as a program: quick, and without a traceback for a user's mistake."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import warm_cli

HEAVY = {
    "torch",
    "pandas",
    "mlflow",
    "ploomber",
    "papermill",
    "whylogs",
    "bentoml",
    "sklearn",
    "matplotlib",
    "sqlalchemy",
    "pandera",
}
COMMANDS = [
    "new",
    "init",
    "doctor",
    "check",
    "plan",
    "run",
    "runs",
    "kernels",
    "build",
    "serve",
    "predictions",
    "compact",
    "forget",
    "drift",
    "performance",
]


def mlnb(*words, cwd=None, **variables):
    return warm_cli.run(words, cwd=cwd or os.getcwd(), env={**os.environ, **variables})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_imports_nothing_heavy(command):
    call = f"cli([{command!r}, '--help'], standalone_mode=False)"
    code = f"import sys\nfrom mlnb.cli.main import cli\n{call}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout
    assert f"mlnb {command}" in done.stdout
    assert not HEAVY & {module.split(".")[0] for module in done.stderr.split()}


@pytest.mark.parametrize("command", ["check", "run", "runs", "build", "serve", "drift log"])
def test_outside_a_project(command, tmp_path):
    done = mlnb(*command.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert "create one with: mlnb new NAME" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_command():
    done = mlnb("rum")
    assert done.returncode == 2
    assert "did you mean 'run'?" in done.stderr


def test_unknown_environment_is_refused_before_any_work(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    done = mlnb("--env", "production", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "no environment 'production'" in done.stderr


def test_doctor_prints_one_document(tmp_path):
    done = mlnb("doctor", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["healthy"] == (done.returncode == 0)
    assert {"item", "state", "detail", "fix"} == set(report["findings"][0])


def test_doctor_names_a_server_that_is_not_there(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.mlnb]\ntracking = "http://127.0.0.1:1"\n')
    done = mlnb("doctor", cwd=tmp_path)
    assert done.returncode == 1
    assert "http://127.0.0.1:1 does not answer" in done.stdout


def test_doctor_finds_a_dead_database_and_keeps_its_password(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    stores = {"MLNB_RECORDS": "postgresql+psycopg://ada:hunter2@127.0.0.1:1/runs", "MLNB_STORAGE": "s3://ada:hunter2@bucket"}
    done = mlnb("doctor", "--json", cwd=tmp_path, **stores)
    found = {f["item"]: f for f in json.loads(done.stdout)["findings"]}
    assert found["Records"]["state"] == "missing" and "127.0.0.1:1 does not answer" in found["Records"]["detail"]
    assert "hunter2" not in done.stdout + done.stderr


def test_telemetry_is_off():
    names = ["WHYLOGS_NO_ANALYTICS", "BENTOML_DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "PLOOMBER_STATS_ENABLED"]
    code = f"import mlnb, os; print(*[os.environ[name] for name in {names}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True", "true", "false"]


def test_doctor_names_what_nothing_reads_and_what_cannot_be_opened(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.mlnb]\npackage = "plnaes"\nstorage = "nowhere://bucket"\n')
    done = mlnb("doctor", "--json", cwd=tmp_path, MLNB_STORGE="elsewhere")
    found = {f["item"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1 and found["Storage"]["state"] == "missing" and "nowhere" in found["Storage"]["detail"]
    assert found["Variables"]["detail"] == "MLNB_STORGE is set, but not used (did you mean 'MLNB_STORAGE'?)"
    assert found["Package"]["detail"] == "no folder plnaes"


def _garbage(file):
    file.write_bytes(b"garbage")


def _cut(file):
    file.write_bytes(file.read_bytes()[:6000])


def _folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("spoil", [_garbage, _cut, _folder])
def test_doctor_reads_the_files_of_records_and_tracking(tmp_path, spoil):
    from mlnb.doctor import stores
    from mlnb.project.settings import load_settings

    with closing(sqlite3.connect(file := tmp_path / "it.db")) as connection:
        connection.executescript("CREATE TABLE t (x); CREATE TABLE u (x); INSERT INTO t VALUES (1)")
    (tmp_path / "pyproject.toml").write_text('[tool.mlnb]\nrecords = "sqlite:///it.db"\ntracking = "sqlite:///it.db"\n')
    found = lambda: {
        f.item: (f.state, f.detail) for f in stores(load_settings(tmp_path)) if f.item in ("Records", "Tracking")
    }
    assert {state for state, _ in found().values()} == {"good"}
    spoil(file)
    for state, words in found().values():
        assert state == "missing" and words.startswith(f"{file} cannot be read: ")


def test_doctor_calls_nothing_good_that_it_did_not_examine(monkeypatch, tmp_path):
    from mlnb import doctor

    def broken(settings):
        yield doctor.DoctorFinding("First half", doctor.GOOD, "fine")
        raise RuntimeError("the rest\u202e cannot be seen")

    (tmp_path / "pyproject.toml").write_text('[tool.mlnb]\nstorage = "memory://bucket"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "CHECKS", [broken, doctor.stores])
    report = doctor.examine()
    found = {f["item"]: f for f in report["findings"]}
    assert not report["healthy"] and found["Broken"]["detail"].startswith("the check failed, RuntimeError: the rest")
    assert found["Storage"]["state"] == "note" and found["Storage"]["detail"] == "memory://bucket, not contacted"


def test_doctor_knows_every_variable_that_the_library_reads(monkeypatch):
    from mlnb import doctor

    modules = Path(doctor.__file__).parent.rglob("*.py")
    names = {name.rstrip("_") for module in modules for name in re.findall(r"\bMLNB_[A-Z_]+", module.read_text())}
    assert {"MLNB_KEYS_FILE", "MLNB_RUNTIME_DIR"} <= names
    for name in names:
        monkeypatch.setenv(name, "1")
    assert list(doctor.variables(None)) == []
