"""Files that are written while others read them, and while their writer is killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import fsspec
import pytest

from mlnb.project.files import find_files, write_atomic

WRITE = """
import itertools, sys
from mlnb.project.files import write_atomic
for i in itertools.count():
    write_atomic(sys.argv[1], str(i % 10) * 100_000)
    if i == 5:
        print("writing", flush=True)
"""


def test_a_file_is_replaced_whole_and_leaves_no_part(tmp_path):
    for content in (b"old", "new \u00e9"):
        assert write_atomic(tmp_path / "deep" / "file", content) == tmp_path / "deep" / "file"
    assert (tmp_path / "deep" / "file").read_text(encoding="utf-8") == "new \u00e9"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]


def test_a_reader_sees_one_content_or_another_and_a_kill_leaves_one(tmp_path):
    file = tmp_path / "file"
    writer = subprocess.Popen([sys.executable, "-c", WRITE, file], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    for _ in range(300):
        text = file.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    text = file.read_text()
    assert len(text) == 100_000 and len(set(text)) == 1


def test_threads_and_processes_that_write_one_file_do_not_mix(tmp_path):
    file, texts = tmp_path / "file", [str(i) * 50_000 for i in range(4)]
    some = [threading.Thread(target=write_atomic, args=(file, text)) for text in texts]
    some += [multiprocessing.get_context("spawn").Process(target=write_atomic, args=(file, text)) for text in texts]
    for one in some:
        one.start()
    for one in some:
        one.join()
    assert file.read_text() in texts and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "file", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fails_is_not_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "deeper" / "file").write_bytes(b"x")
    files, place = fsspec.core.url_to_fs(str(tmp_path))
    assert list(find_files(files, place)) == [f"{place}/deep/deeper/file"]
    assert find_files(files, f"{place}/none") == find_files(files, f"{place}/deep/deeper/file/none") == {}
    scan = os.scandir

    def failing(path):
        if path.endswith("deeper"):
            raise OSError(5, "Input/output error")
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="Input/output error"):
        find_files(files, place)
