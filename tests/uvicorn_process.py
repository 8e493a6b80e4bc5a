"""`mlnb serve --no-bento` as a process of its own, for tests that need a real socket; and callers who count what was
answered."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import httpx
import psutil
import toy_project
from waiting import free_port, until, wait_until_ready

MLNB = (sys.executable, "-c", "from mlnb.cli.main import main; main()")


@contextmanager
def run_server(toy, predictions, *arguments, **variables):
    "The process and the URL of a plain server of the toy project; everything has ended after the block"
    port = free_port()
    env = toy_project.environment(toy) | {"MLNB_PREDICTIONS": str(predictions), **variables}
    command = [*MLNB, "serve", "--no-bento", "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd=toy, env=env, stderr=subprocess.PIPE, text=True)
    everyone = []
    try:
        url = wait_until_ready(process, f"http://127.0.0.1:{port}")
        everyone = psutil.Process(process.pid).children(recursive=True)
        yield process, url
    finally:
        everyone += psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        for child in everyone:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate(timeout=60)  # until no process has its end of the pipe


def workers(process) -> list[psutil.Process]:
    "The workers of a plain server, without multiprocessing's own helper"
    return [p for p in psutil.Process(process.pid).children() if _is_worker(p)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:  # it has just died
        return False


class Callers:
    "Threads that ask until they are stopped, and remember the request ids of what was acknowledged"

    def __init__(self, url: str, row: dict, threads: int = 4):
        self.url, self.row, self.acknowledged, self._stop = url, row, [], threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self):
        while not self._stop.is_set():
            try:
                with httpx.Client(base_url=self.url, timeout=20) as http:
                    while not self._stop.is_set():
                        answers = http.post("/predict", json=[self.row, self.row]).json()
                        self.acknowledged.extend(a["request_id"] for a in answers)
            except (httpx.TransportError, json.JSONDecodeError):
                self._stop.wait(0.02)  # the worker died: ask another one

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int):
        "Wait until `more` answers than now are acknowledged"
        enough = len(self.acknowledged) + more
        until(lambda: len(self.acknowledged) >= enough, f"answer {enough}")
