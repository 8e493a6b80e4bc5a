"""Processes, ports and servers of tests, and waiting for them: as long as it takes on a busy machine."""

import secrets
import socket
import subprocess
import time
from contextlib import suppress

import httpx
import psutil

TIMEOUT_SECONDS = 120


def until(condition, description="it", timeout=TIMEOUT_SECONDS):
    "Wait for a condition and return its value; fail after `timeout` seconds"
    end = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < end, f"{description} did not come in {timeout} seconds"
        time.sleep(0.02)
    return result


def is_alive(pid: int) -> bool:
    "Whether a process runs; a zombie, which has ended and was not waited for, does not"
    try:
        return psutil.Process(int(pid)).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    "A port below those that the system gives to connections, so that no connection takes it before the server does"
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def wait_until_ready(process: subprocess.Popen, url: str, path: str = "/readyz") -> str:
    "`url` once it answers; fails at once if the process has ended"

    def answers():
        assert process.poll() is None, "the server ended before it was ready"
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}{path}", timeout=5).status_code == 200

    until(answers, f"{url}{path}")
    return url
