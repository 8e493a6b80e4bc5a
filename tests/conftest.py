import os
import shutil
import signal
import sys
import tempfile
import time

import pytest

from mlnb.notebooks.jsonschema_import import without_slow_jsonschema

with without_slow_jsonschema():  # which takes seconds in each test worker
    import jsonschema  # noqa: F401

# A shell that starts the tests in the background makes its children ignore Ctrl-C; the programs under test must not
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.umask(0o022)  # some tests let another user read what they make, and others see that nobody else may

os.environ["MLNB_TRACK_RUNS"] = "false"  # no process that writes to MLflow is left behind; its own tests ask for it
os.environ["MLNB_TRUSTED_PACKAGES"] = "toy,planes,test_hooks,test_routing"  # of the small projects of the tests

for name in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
):  # threads of two test workers wait for each other by spinning
    os.environ.setdefault(name, "1")

for name in (
    "COLUMNS",
    "FORCE_COLOR",
    "LINES",
    "TTY_COMPATIBLE",
):  # what a program prints into a file is what is tested
    os.environ.pop(name, None)
for name in ("no_proxy", "NO_PROXY"):  # every server is on this machine
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost")))

collect_ignore = ["data"]  # projects with tests of their own, which are data here

IS_FIRST = "PYTEST_XDIST_WORKER" not in os.environ  # the process that starts the others
if IS_FIRST:
    os.environ["MLNB_RUNTIME_DIR"] = tempfile.mkdtemp(
        prefix="mlnb-"
    )  # one fork server for all tests, which ends with them


def pytest_unconfigure(config):
    if IS_FIRST:
        from mlnb.notebooks import kernels

        kernels.stop(kill=True)
        shutil.rmtree(os.environ["MLNB_RUNTIME_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    "A tiny project with its bundle; its package can be imported. Read it, copy it, do not change it"
    import toy_project

    root = toy_project.make(tmp_path_factory.mktemp("toy") / "project")
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


@pytest.fixture
def forget_projects():
    "The packages of the projects that a test imports are not there for the tests after it"
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("flight_delays", "shipped"):
            del sys.modules[name]


@pytest.fixture
def fixed_clock(monkeypatch):
    "No hour ends, and no file of a log with it"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
