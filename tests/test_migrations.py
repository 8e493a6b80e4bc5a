"""Stores of other versions, and two processes that open a store at once."""

import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from mlnb import migrations
from mlnb.project.errors import SettingError
from mlnb.records import Records, _tables

FIRST = """
create table run (id varchar(32) not null, pipeline varchar(200) not null, parameters text not null,
    started datetime not null,
    ended datetime, status varchar(20) not null, primary key (id));
create table task (run_id varchar(32) not null, name varchar(200) not null, status varchar(20) not null,
    seconds float not null,
    notebook text, error text, primary key (run_id, name), foreign key(run_id) references run (id));
insert into run values ('20260101T000000-aaaaaa', 'flights', '{"seed": 7}',
    '2026-01-01 00:00:00.000000', '2026-01-01 00:01:00.000000', 'failed');
insert into task values ('20260101T000000-aaaaaa', 'train', 'failed', 1.5, '/old/train.ipynb', 'KeyError: 1');
"""  # as the first mlnb made it, before stores had a version

OPENER = "import sys; from mlnb.records import Records; print(len(Records(sys.argv[1]).runs()))"


@pytest.fixture
def first(tmp_path):
    with sqlite3.connect(tmp_path / "records.db") as connection:
        connection.executescript(FIRST)
    connection.close()
    return f"sqlite:///{tmp_path}/records.db"


def test_a_store_without_a_version_keeps_its_rows(first):
    records = Records(first)
    (run,) = records.runs()
    assert (run["id"], run["parameters"], run["status"], run["resumed"]) == (
        "20260101T000000-aaaaaa",
        {"seed": 7},
        "failed",
        None,
    )
    assert run["tracked"] == ""  # nobody wants to see it appear in MLflow now
    (task,) = records.tasks(run["id"])
    assert (task["seconds"], task["notebook"], task["error"], task["metrics"]) == (
        1.5,
        "/old/train.ipynb",
        "KeyError: 1",
        None,
    )
    new = records.start_run("flights", {})
    records.put_task(new, "train", status="executed", reason="it is new")
    assert [r["id"] for r in records.runs()] == [new, run["id"]]
    records.close()


def test_a_table_that_is_missing_is_made(tmp_path):
    with sqlite3.connect(tmp_path / "records.db") as connection:
        connection.executescript(FIRST.partition(";")[0])  # a process was killed between its two tables
    connection.close()
    records = Records(f"sqlite:///{tmp_path}/records.db")
    records.put_task(records.start_run("flights", {}), "train", status="executed")
    records.close()


def test_migrations_lead_to_the_schema_that_statements_use(tmp_path):
    records = Records(f"sqlite:///{tmp_path}/records.db")
    with records.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": migrations.TABLE})
        different = compare_metadata(context, _tables())
        assert context.get_current_revision() == str(len(migrations.MIGRATIONS))
    named = [d for d in different if "index" not in str(d[0])]
    assert named == []
    records.close()


def test_a_store_of_a_newer_mlnb_is_refused_and_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/records.db"
    Records(url).start_run("flights", {})
    with sqlite3.connect(tmp_path / "records.db") as connection:
        connection.execute("update mlnb_version set version_num = '99'")
    connection.close()
    records = Records(url)
    with pytest.raises(SettingError, match=r"are of a newer mlnb \(schema 99, this one supports \d+\): upgrade mlnb"):
        records.runs()
    with pytest.raises(SettingError, match="newer mlnb"):
        records.start_run("flights", {})
    with sqlite3.connect(tmp_path / "records.db") as connection:
        assert connection.execute("select count(*) from run").fetchone() == (1,)
    connection.close()


@pytest.mark.parametrize("old", [False, True])
def test_processes_open_a_store_at_once(tmp_path, old, request):
    url = request.getfixturevalue("first") if old else f"sqlite:///{tmp_path}/new/records.db"
    openers = [subprocess.Popen([sys.executable, "-c", OPENER, url], stdout=-1, stderr=-1, text=True) for _ in range(6)]
    for opener in openers:
        output, errors = opener.communicate(timeout=120)
        assert opener.returncode == 0, errors
        assert output.strip() == ("1" if old else "0")


def test_a_migration_that_fails_leaves_the_store_as_it_was(first, monkeypatch):
    def broken(op):
        op.add_column("run", sa.Column("extra", sa.Text))
        raise RuntimeError("power cut")

    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, broken))
    with pytest.raises(RuntimeError):
        Records(first).runs()
    monkeypatch.undo()
    records = Records(first)
    with records.engine.connect() as connection:
        assert migrations.version(connection) == len(migrations.MIGRATIONS)
        assert "extra" not in {c["name"] for c in sa.inspect(connection).get_columns("run")}
    assert len(records.runs()) == 1
    records.close()


def test_alembic_is_not_imported_for_a_store_that_is_up_to_date(tmp_path):
    url = f"sqlite:///{tmp_path}/records.db"
    Records(url).start_run("flights", {})
    code = "import sys; from mlnb.records import Records; assert 'sqlalchemy' not in sys.modules\n"
    code += "Records(sys.argv[1]).runs(); print('alembic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
