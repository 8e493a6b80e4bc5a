"""Records under several processes and from other times."""

import subprocess
import sys

import pytest

from mlnb.project.errors import SettingError
from mlnb.records import Records

WRITER = """
import sys
from mlnb.records import Records
records = Records(sys.argv[1])
for i in range(20):
    run = records.start_run("demo", {"writer": sys.argv[2], "i": i})
    records.add_task(run, "only", "executed", 0.1)
    records.end_run(run, "succeeded")
"""


def test_four_processes_open_a_new_store_at_once_and_lose_nothing(tmp_path):
    url = f"sqlite:///{tmp_path}/new/records.db"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, url, str(n)], stderr=subprocess.PIPE, text=True) for n in range(4)]
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
    with pytest.raises(SettingError, match=r"setting 'records' has value .*not a database"):
        Records(f"sqlite:///{tmp_path}/records.db").runs()


def test_a_server_that_is_not_there():
    with pytest.raises(SettingError, match="setting 'records'"):
        Records("postgresql://127.0.0.1:1/nothing").runs()
