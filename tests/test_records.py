"""Records under several processes and from other times."""

import shutil
import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy as sa

from mlnb.project.errors import RecordError, SettingError
from mlnb.records import Records, current_process_name, git_commit, git_state, is_process_dead, utc_now

WRITER = """
import sys
from mlnb.records import Records
records = Records(sys.argv[1])
for i in range(20):
    run = records.start_run("demo", {"writer": sys.argv[2], "i": i})
    records.put_task(run, "only", status="executed", seconds=0.1)
    records.end_run(run, "succeeded")
"""


def test_four_processes_open_a_new_store_at_once_and_lose_nothing(tmp_path):
    url = f"sqlite:///{tmp_path}/new/records.db"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, url, str(n)], stderr=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    records = Records(url)
    runs = records.runs(limit=1000)
    assert len(runs) == 80
    assert {r["status"] for r in runs} == {"succeeded"}
    assert sorted({r["parameters"]["writer"] for r in runs}) == ["0", "1", "2", "3"]
    records.close()


def test_newest_run_first(tmp_path):
    records = Records(f"sqlite:///{tmp_path}/records.db")
    ids = [records.start_run("demo", {}) for _ in range(3)]
    assert [r["id"] for r in records.runs(limit=2)] == ids[::-1][:2]
    records.close()


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "records.db").write_text("this is not SQLite, " * 100)
    with pytest.raises(SettingError, match=r"the records in .* are damaged \(.*not a database\)"):
        Records(f"sqlite:///{tmp_path}/records.db").runs()


@pytest.mark.parametrize("words", ["database disk image is malformed", "file is not a database"])
def test_records_that_are_damaged_after_they_were_opened(tmp_path, words, monkeypatch):
    records = Records(f"sqlite:///{tmp_path}/records.db")
    records.start_run("demo", {})
    failing = records.engine.dialect.__class__
    monkeypatch.setattr(failing, "do_execute", lambda *_: (_ for _ in ()).throw(sqlite3.DatabaseError(words)))
    with pytest.raises(
        RecordError,
        match=rf"the records in {tmp_path}/records.db are damaged \({words}\); restore a backup.* mlnb runs, which",
    ):
        records.runs()
    records.close()


def test_a_server_that_is_not_there():
    with pytest.raises(SettingError, match="setting 'records'"):
        Records("postgresql://127.0.0.1:1/nothing").runs()


def test_a_task_is_noted_more_than_once(tmp_path):
    records = Records(f"sqlite:///{tmp_path}/records.db")
    run = records.start_run("demo", {}, selection={"tasks": ["b"], "force": True}, resumed="earlier")
    records.put_task(run, "b", status="running", started=utc_now(), attempts=1)
    records.put_task(run, "a")
    records.put_task(run, "b", status="failed", error="bad \0 text \ud800", cell=3, ended=utc_now().isoformat())
    records.put_task(run, "b", attempts=2, metrics={"auc": 0.5, "loss": None}, fingerprint={"notebook": "aa"})
    b, a = records.tasks(run)
    assert (a["name"], a["status"], a["seconds"]) == ("a", "waiting", 0.0)
    assert (b["status"], b["attempts"], b["cell"], b["error"]) == ("failed", 2, 3, "bad  text ?")
    assert (
        b["started"] <= b["ended"]
        and b["metrics"] == {"auc": 0.5, "loss": None}
        and b["fingerprint"] == {"notebook": "aa"}
    )
    assert (records.run(run)["selection"], records.run(run)["resumed"]) == ({"tasks": ["b"], "force": True}, "earlier")
    with pytest.raises(TypeError, match=r"no column 'metric' \(did you mean 'metrics'\?\)"):
        records.put_task(run, "b", metric=1)
    records.close()


def test_a_run_is_named_by_its_id_its_beginning_its_end_or_its_place(tmp_path):
    records = Records(f"sqlite:///{tmp_path}/records.db")
    with pytest.raises(RecordError, match="there are no runs yet"):
        records.run("last")
    for i, pipeline in enumerate(["a", "a", "b"]):
        records.put(
            [
                (
                    "run",
                    {"id": f"2026010{i}T000000-abc{i}0f"},
                    {"pipeline": pipeline, "started": f"2026-01-0{i + 1}T00:00:00"},
                )
            ]
        )
    for which, number in {
        "last": 2,
        "last~2": 0,
        "20260101": 1,
        "abc1": 1,
        "abc10f": 1,
        "20260102T000000-abc20f": 2,
    }.items():
        assert records.run(which)["id"].startswith(f"2026010{number}"), which
    assert records.run("last", pipeline="a")["id"] == "20260101T000000-abc10f"
    wrong = {
        "2026": "may be any of 3 runs",
        "last~3": "the first one is last~2",
        "last~x": "is not the name of a run",
        "%": "no run",
    }
    for which, says in (wrong | {"abx10f": "did you mean 'abc10f'"}).items():
        with pytest.raises(RecordError, match=says):
            records.run(which)
    records.close()


def test_a_run_whose_process_was_killed_is_lost(tmp_path):
    url = f"sqlite:///{tmp_path}/records.db"
    code = "import sys, time; from mlnb.records import Records\n"
    code += "print(Records(sys.argv[1]).start_run('demo', {}), flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True) as process:
        run, records = process.stdout.readline().strip(), Records(url)
        assert records.run(run)["status"] == "running" and [r["id"] for r in records.runs(status="running")] == [run]
        process.kill()
    assert (
        records.run(run)["status"] == "lost"
        and records.runs(status="running") == []
        and len(records.runs(status="lost")) == 1
    )
    records.put([("run", {"id": run}, {"process": "1@another"})])  # nobody here can know
    assert records.run(run)["status"] == "running"
    records.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux shows when a process began")
def test_a_process_number_that_is_used_again():
    assert is_process_dead(current_process_name().rpartition(" ")[0] + " 1") and not is_process_dead(
        current_process_name()
    )


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_read_from_the_files(tmp_path):
    (tmp_path / "inner").mkdir()
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None and git_state(tmp_path) is None  # no commit yet
    (tmp_path / "inner" / "file").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path / "inner") == head and git_state(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "inner" / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": head, "dirty": True}
    git(tmp_path, "pack-refs", "--all")
    assert git_commit(tmp_path) == head
    git(tmp_path, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    assert git_state(tmp_path / "tree") == {"commit": head, "dirty": False}
    git(tmp_path, "checkout", "-q", "--detach")
    assert git_commit(tmp_path) == head


def test_a_store_that_fails_after_it_was_opened_says_so_in_words(tmp_path):
    records = Records(f"sqlite:///{tmp_path}/records.db", lock_timeout=0.1)
    run = records.start_run("demo", {})
    holder = sqlite3.connect(tmp_path / "records.db", isolation_level=None)
    holder.execute("begin immediate")
    for act in (lambda: records.end_run(run, "failed"), lambda: records.exclusive_transaction(1).__enter__()):
        with pytest.raises(RecordError, match=r"records.db' cannot be read or written: database is locked$"):
            act()
    holder.close()
    records.end_run(run, "failed")
    with pytest.raises(sa.exc.IntegrityError):  # the store is well, the change is not
        records.put([("task", {"run_id": None, "name": "a"}, {})])
    records.close()


def test_tasks_of_many_runs_are_counted(tmp_path):
    records, ids = Records(f"sqlite:///{tmp_path}/records.db"), [f"20260101T000000-{i:06x}" for i in range(40_000)]
    with records.engine.begin() as connection:
        connection.execute(records.table("run").insert(), [{"id": i} for i in ids])
        rows = [
            {"run_id": i, "name": name, "status": status}
            for i in ids
            for name, status in (("a", "executed"), ("b", "failed"))
        ]
        connection.execute(records.table("task").insert(), rows)
    assert records.counts(ids) == {i: {"executed": 1, "failed": 1} for i in ids} and records.counts([]) == {}
    records.close()


def test_a_password_is_not_shown():
    with pytest.raises(SettingError) as e:
        Records("postgresql://me:secret@127.0.0.1:1/nothing").runs()
    assert "secret" not in str(e.value)


def test_a_driver_that_is_missing_is_named_as_pip_calls_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(SettingError, match=r"install it: pip install '(psycopg\[binary\]|psycopg2-binary)'"):
        Records("postgresql://127.0.0.1:1/nothing").runs()
