"""A disk that is full, or a folder that is not ours, costs the service its metrics or its readiness, and never the
process."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
import toy_project
from uvicorn_process import MLNB
from waiting import free_port, until

COUNT = """
import os, sys
import prometheus_client, prometheus_client.multiprocess
from mlnb.serving.service_metrics import ServiceMetrics
os.setuid(int(sys.argv[2]))
metrics = ServiceMetrics()
print("shared" if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else "alone", flush=True)
for number in range(int(sys.argv[1])):
    metrics.count(200, f"{number:04}" * 20)
    metrics.observe_duration({("v1", "champion"): 1}, 0.1)
sys.stdout.write(metrics.text().decode())
"""


ME = os.geteuid()


def counted(folder, labels=1, user=ME) -> tuple[list[str], str]:
    "Lines of the metrics of a process that has counted under so many labels, and what it said"
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(labels), str(user)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.splitlines(), done.stderr


@pytest.fixture
def disk(tmp_path):
    "Mounts small disks; skips where that is not allowed"
    mounted = []

    def mount(folder, size: str):
        folder.mkdir(parents=True, exist_ok=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode:
            pytest.skip("only root can mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_when_the_process_begins(disk, tmp_path):
    folder = disk(tmp_path / "full", "8k")
    lines, said = counted(folder)
    assert lines[0] == "alone" and any(line.startswith("mlnb_requests_total{") for line in lines)
    assert said.splitlines() == [
        f"mlnb: metrics cannot be kept in {folder} (No space left on device); each worker reports only its own"
    ]
    assert not list(folder.iterdir())


def test_a_disk_that_fills_up_while_files_grow(disk, tmp_path):
    lines, said = counted(disk(tmp_path / "small", "128k"), labels=500)
    kept = [line for line in lines if line.startswith("mlnb_requests_total{")]
    assert lines[0] == "shared" and 50 < len(kept) < 500
    assert said.splitlines() == [
        "mlnb: a metric cannot be kept, and is not counted until it can: No space left on device"
    ]


def test_a_folder_that_is_missing_is_made_and_a_file_in_its_place_is_not_removed(tmp_path):
    assert counted(tmp_path / "a/b", labels=300)[0][0] == "shared"
    (tmp_path / "file").write_text("mine")
    assert counted(tmp_path / "file")[0][0] == "alone" and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(ME != 0, reason="only root can become another user")
def test_a_folder_of_another_user():
    with tempfile.TemporaryDirectory() as place:  # one that another user can enter
        (folder := Path(place)).chmod(0o755)
        assert "Permission denied" in counted(folder, user=65534)[1]
        folder.chmod(0o1777)
        (folder / "counter_1.db").write_bytes(bytes(4096))
        (folder / "counter_1.db").chmod(0o600)
        lines, said = counted(folder, user=65534)
    assert (
        lines[0] == "shared"
        and any("mlnb_requests_total{" in line for line in lines)
        and "those of one worker are reported" in said
    )


def test_a_left_over_file_that_is_none_of_ours(tmp_path):
    (tmp_path / "counter_1.db").write_bytes(b"\x01" * 100)
    lines, said = counted(tmp_path)
    assert any("mlnb_requests_total{" in line for line in lines) and "those of one worker are reported" in said


@pytest.fixture
def server():
    "Starts `mlnb serve` and waits until its probes answer"
    started = []

    def start(root, *arguments, **variables):
        port = free_port()
        env = toy_project.environment(root) | variables
        process = subprocess.Popen(
            [*MLNB, "serve", "--port", str(port), *arguments], cwd=root, env=env, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or _answers(f"{url}/livez"), "the probe")
        return process, url

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def _answers(url: str) -> bool:
    try:
        return toy_project.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("how", ["--no-bento", "--development"])
def test_everything_that_a_service_writes_is_on_a_full_disk(toy, tmp_path, disk, server, how):
    root = shutil.copytree(toy, tmp_path / "project")
    disk(root / ".mlnb/metrics", "8k")
    temporary = disk(tmp_path / "temporary", "40k")
    full = disk(tmp_path / "full", "8k")
    with (full / "rest").open("wb") as rest, pytest.raises(OSError, match="No space left"):
        rest.write(bytes(1 << 16))
        rest.flush()
    places = {f"MLNB_{name.upper()}": str(full / name) for name in ("predictions", "labels")}
    process, url = server(root, how, TMPDIR=str(temporary), **places)
    row = toy_project.example(root)
    assert (
        toy_project.get(f"{url}/readyz").status_code == 503 == toy_project.post(f"{url}/predict", json=row).status_code
    )
    (full / "rest").unlink()
    until(lambda: _answers(f"{url}/readyz"), "readiness")
    assert toy_project.post(f"{url}/predict", json=row).status_code == 200
    assert 'status="503"' in toy_project.get(f"{url}/metrics").text
    process.terminate()
    assert "metrics cannot be kept in" in process.communicate(timeout=60)[1]
