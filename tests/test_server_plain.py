import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import toy_project
from uvicorn_process import MLNB, Callers, run_server, workers
from waiting import until, wait_until_ready

from mlnb.serving.log_reader import read_predictions


@pytest.fixture
def row(toy):
    return toy_project.example(toy)


def counted(acknowledged: list[str], folder) -> None:
    "Every acknowledged answer is in the log, once"
    logged = read_predictions(folder)["request_id"]
    assert len(acknowledged) > 100 and logged.is_unique and set(acknowledged) <= set(logged)


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_worker_is_replaced_and_nothing_acknowledged_is_lost(toy, tmp_path, row, count):
    with run_server(toy, tmp_path, "--workers", str(count)) as (process, url):
        assert len(first := workers(process)) == count
        with Callers(url, row) as callers:
            for number in (signal.SIGKILL, signal.SIGTERM):
                callers.wait_for(100)
                victim = workers(process)[0]
                victim.send_signal(number)
                victim.wait(60)
            callers.wait_for(100)  # another worker answers
        until(lambda: len(workers(process)) == count, f"worker {count}")
        assert not {w.pid for w in workers(process)} & {first[0].pid}
    counted(callers.acknowledged, tmp_path)


def test_a_terminated_server_answers_what_it_took_and_leaves_no_process(toy, tmp_path, row):
    with run_server(toy, tmp_path, "--workers", "2") as (process, url):
        everyone = psutil.Process(process.pid).children(recursive=True)
        with Callers(url, row) as callers:
            callers.wait_for(200)
            process.terminate()
            assert process.wait(60) in (0, -signal.SIGTERM)
        assert not psutil.wait_procs(everyone, timeout=60)[1]
    counted(callers.acknowledged, tmp_path)


def test_no_worker_outlives_a_killed_supervisor(toy, tmp_path):
    with run_server(toy, tmp_path, "--workers", "2") as (process, _):
        everyone = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        assert not psutil.wait_procs(everyone, timeout=60)[1]


def test_a_worker_that_is_still_starting_ends_with_its_supervisor_too(toy, tmp_path):
    with run_server(toy, tmp_path) as (process, _):
        victim = workers(process)[0]
        victim.kill()
        while not (everyone := [w for w in workers(process) if w.pid != victim.pid]):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert not psutil.wait_procs(everyone, timeout=60)[1]


def test_metrics_are_summed_over_workers(toy, tmp_path, row):
    with run_server(shutil.copytree(toy, tmp_path / "toy"), tmp_path / "log", "--workers", "2") as (process, url):
        for _ in range(40):  # a connection each, so that both workers answer
            assert toy_project.post(f"{url}/predict", json=row).status_code == 200
        workers(process)[0].kill()
        wait_until_ready(process, url)
        text = toy_project.get(f"{url}/metrics").text
    assert 'mlnb_requests_total{status="200",validity="valid"} 40.0' in text
    assert 'mlnb_predictions_total{arm="champion",version="v1"} 40.0' in text


def refused(toy, *arguments, **variables) -> str:
    "What is said by a server that does not start"
    environment = toy_project.environment(toy) | variables
    done = subprocess.run([*MLNB, "serve", *arguments], cwd=toy, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("how", ["--no-bento", "--development"])
def test_no_server_starts_for_others_without_a_key(toy, how):
    assert "no API key is set; make one with: python -c" in refused(toy, how, "--host", "0.0.0.0")
    assert "or write keys_required = false" in refused(toy, how, MLNB_KEYS_REQUIRED="true")
    told = refused(toy, how, MLNB_KEYS="predict:secret-but-short")
    assert "key 1 of MLNB_KEYS has 16 characters" in told and "secret" not in told.replace("secrets", "")


def test_plain_and_bento_exclude_each_other(toy):
    done = subprocess.run(
        [*MLNB, "serve", "--no-bento", "--bento", "toy:1"],
        cwd=toy,
        env=toy_project.environment(toy),
        capture_output=True,
    )
    assert done.returncode == 2 and b"--bento and --no-bento exclude each other" in done.stderr


def test_a_bundle_that_breaks_under_the_server_stops_no_other_worker(toy, tmp_path, row):
    root = shutil.copytree(toy, tmp_path / "toy")
    samples = root / "products/bundle/samples.json"
    kept = samples.read_bytes()
    with run_server(root, tmp_path / "log", "--workers", "2") as (process, url):
        samples.write_bytes(kept + b" ")
        victim = workers(process)[0]
        victim.kill()
        while "samples.json has changed since it was written" not in process.stderr.readline():
            assert process.poll() is None
        assert all(toy_project.post(f"{url}/predict", json=row).status_code == 200 for _ in range(5))
        samples.write_bytes(kept)
        with Callers(url, row) as callers:
            callers.wait_for(200)
        assert process.poll() is None and victim.pid not in {w.pid for w in workers(process)}
