"""The records on a PostgreSQL server, where MLNB_TEST_POSTGRESQL names a database that may be emptied.

    pip install "psycopg[binary]"
    MLNB_TEST_POSTGRESQL=postgresql://postgres@127.0.0.1:5432/postgres pytest tests/test_postgresql.py
"""

import os
import subprocess
import sys

import pytest
import sqlalchemy as sa

from mlnb import migrations
from mlnb.pipelines import recorder as module
from mlnb.pipelines.recorder import Recorder, replay
from mlnb.project.errors import SettingError
from mlnb.records import Records

URL = os.environ.get("MLNB_TEST_POSTGRESQL", "")
pytestmark = pytest.mark.skipif(not URL, reason="MLNB_TEST_POSTGRESQL names no server")
WRITER = """
import sys
from pathlib import Path
from mlnb.pipelines import recorder
recorder.START_DELAY_SECONDS = 0
for i in range(5):
    with recorder.Recorder(sys.argv[1], Path(sys.argv[2])) as r:
        run = r.start_run("demo", {"i": i})
        r.put_task(run, "a", status="running")
        r.put_task(run, "a", status="executed", metrics={"auc": 0.5})
        r.end_run(run, "succeeded")
"""


@pytest.fixture
def records():
    engine = sa.create_engine(URL)
    with engine.begin() as connection:
        for table in ("alert_delivery", "alert_event", "alert_rule", "alert", "task", "run", migrations.TABLE):
            connection.execute(sa.text(f"drop table if exists {table}"))
    engine.dispose()
    records = Records(URL)
    yield records
    records.close()


def test_processes_open_a_new_store_at_once_and_lose_nothing(records, tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, URL, str(tmp_path)], stderr=-1, text=True) for _ in range(4)
    ]
    for writer in writers:
        assert writer.communicate(timeout=120)[1] == "" and writer.returncode == 0
    runs = records.runs(100)
    assert [r["status"] for r in runs] == ["succeeded"] * 20 and not list(tmp_path.iterdir())
    assert all(
        [(t["status"], t["metrics"]) for t in records.tasks(r["id"])] == [("executed", {"auc": 0.5})] for r in runs
    )


def test_a_store_without_a_version_is_migrated(records):
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    engine = sa.create_engine(URL)
    with engine.begin() as connection:
        migrations._runs_and_tasks(Operations(MigrationContext.configure(connection)))
        connection.execute(
            sa.text("insert into run values ('r1', 'flights', '{\"seed\": 7}', '2026-01-01', null, 'failed')")
        )
        connection.execute(sa.text("insert into task values ('r1', 'train', 'failed', 1.5, null, 'KeyError')"))
    engine.dispose()
    assert records.run("last")["parameters"] == {"seed": 7} and records.tasks("r1")[0]["error"] == "KeyError"
    with records.engine.begin() as connection:
        assert migrations.version(connection) == len(migrations.MIGRATIONS)
        connection.execute(sa.text(f"update {migrations.TABLE} set version_num = '99'"))
    with pytest.raises(SettingError, match="newer mlnb"):
        Records(URL).runs()


def test_a_migration_that_fails_leaves_the_store_as_it_was(records, monkeypatch):
    def broken(op):
        op.add_column("run", sa.Column("extra", sa.Text))
        raise RuntimeError("power cut")

    records.start_run("demo", {})
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, broken))
        Records(URL).runs()
    assert len(Records(URL).runs()) == 1
    with records.engine.connect() as connection:
        assert "extra" not in {c["name"] for c in sa.inspect(connection).get_columns("run")}


def test_what_a_store_takes_the_other_takes(records):
    run = records.start_run("demo", {"when": "ü", "n": 1}, selection={"tasks": ["a"]}, resumed="earlier")
    records.put_task(
        run, "x" * 500, status="failed", error="bad \0 text \ud800", seconds=1, started="2026-01-01T00:00:00+01:00"
    )
    (task,) = records.tasks(run)
    assert task["error"] == "bad  text ?" and str(task["started"]) == "2025-12-31 23:00:00" and len(task["name"]) == 200
    assert records.run(run[-6:])["id"] == records.run(run[:8])["id"] == records.run("last")["id"] == run
    assert records.counts([run]) == {run: {"failed": 1}} and len(records.runs(status="running")) == 1
    records.set_tracked(run, "abc")
    records.remove([run])
    assert records.runs() == []


def test_one_change_that_is_refused_holds_nothing_else_up(records, tmp_path, caplog):
    recorder = Recorder(URL, tmp_path)
    run = recorder.start_run("demo", {})
    recorder.put_task(run, "a", status="executed", seconds="long")  # SQLite would take it
    recorder.put_task(run, "b", status="executed")
    recorder.end_run(run, "succeeded")
    recorder.close(wait=False)
    assert replay(records, tmp_path) == [run] and "1 damaged lines" in caplog.text
    assert records.run(run)["status"] == "succeeded" and [t["name"] for t in records.tasks(run)] == ["b"]


def test_a_server_that_ends_a_connection(records, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.0)
    with Recorder(URL, tmp_path) as recorder:
        run = recorder.start_run("demo", {})
        while not records.runs():
            pass
        others = "pid <> pg_backend_pid() and datname = current_database()"
        ended = f"select pg_terminate_backend(pid) from pg_stat_activity where {others}"
        with records.engine.connect() as connection:
            connection.execute(sa.text(ended))
        recorder.put_task(run, "a", status="executed")
        recorder.end_run(run, "succeeded")
    assert (
        records.run(run)["status"] == "succeeded"
        and records.tasks(run)[0]["status"] == "executed"
        and not caplog.records
    )
