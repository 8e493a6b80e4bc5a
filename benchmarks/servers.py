"""Servers to be compared: each a process of its own on a free port, ready, proved to answer rightly, and ended by its
pid."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import needs
import psutil

BENCHMARK_FOLDER = Path(__file__).parent
SERVER_CORE, LOAD_CORE = "0", "1"
JSON = {"content-type": "application/json"}


def pinned(core: str) -> list[str]:
    """What a command begins with to stay on one core; nothing where the machine has but one, or no taskset."""
    return ["taskset", "--cpu-list", core] if shutil.which("taskset") and os.cpu_count() > 1 else []


@dataclass(frozen=True)
class Server:
    """How a server is started and asked."""

    name: str
    command: list[str]  # {port}, here and in the environment: the port
    folder: Path  # in which it runs
    environment: dict[str, str]
    path: str = "/predict"
    ready: str = "/readyz"
    headers: dict[str, str] = field(default_factory=lambda: JSON)
    to_request: Callable = lambda row: row  # a row as this server wants it
    to_probability: Callable = lambda answer: answer["probability"]  # the probability in its answer


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    server: Server
    process: psutil.Popen
    url: str  # without a path

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu(self) -> float:
        """CPU seconds of all its processes so far."""
        return sum(sum(p.cpu_times()[:2]) for p in self.processes())

    def memory(self) -> float:
        """Resident megabytes of all its processes."""
        return sum(p.memory_info().rss for p in self.processes()) / 1e6

    def ask(self, path: str, body: bytes | None = None, headers: dict | None = None) -> bytes:
        """The body of the answer to a POST, or to a GET where nothing is sent."""
        request = urllib.request.Request(self.url + path, body, self.server.headers if headers is None else headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def probability(self, row: dict) -> float:
        """What it predicts for a row."""
        return self.server.to_probability(
            json.loads(self.ask(self.server.path, json.dumps(self.server.to_request(row)).encode()))
        )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """Variables of a server: none of the caller's settings, one thread for numpy, the model's package to import."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLNB_", "BENTOML_", "PROMETHEUS_", "MLFLOW_"))}
    quiet = {
        "BENTOML_DO_NOT_TRACK": "true",
        "DO_NOT_TRACK": "true",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return (
        kept
        | quiet
        | {"PYTHONPATH": f"{BENCHMARK_FOLDER}:{BENCHMARK_FOLDER / 'peers'}", "PYTHONUNBUFFERED": "1"}
        | more
    )


@contextlib.contextmanager
def running(server: Server):
    """Start a server, wait until it is ready, and end it with all that it started."""
    port, log = free_port(), server.folder / f"{server.name.replace(' ', '_')}.log"
    filled = lambda text: text.replace("{port}", str(port))
    command = [*pinned(SERVER_CORE), *map(filled, server.command)]
    variables = {k: filled(v) for k, v in server.environment.items()}
    with log.open("wb") as out:
        process = psutil.Popen(command, cwd=server.folder, env=variables, stdout=out, stderr=subprocess.STDOUT)
    one = Running(server, process, f"http://127.0.0.1:{port}")
    try:
        wait_ready(one, log)
        yield one
    finally:
        end(process)


def wait_ready(one: Running, log: Path, seconds: float = 120):
    """Wait until a server answers; ends the program with 2 and the server's last words where it does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and one.process.poll() is None:
        with contextlib.suppress(OSError):
            one.ask(one.server.ready)
            return
        time.sleep(0.1)
    needs.cannot_run(f"{one.server.name} did not become ready", f"it said:\n{log.read_text()[-2000:]}")


def end(process: psutil.Popen):
    """Ask a process to end, and kill what is left of it and its children."""
    processes = [process, *process.children(recursive=True)] if process.is_running() else []
    if processes:
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=5)
    for one in alive:
        one.kill()
    process.wait()


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


# Ours. The names of commands, settings and headers that the comparison needs stand here and nowhere else.

KEY = "0123456789abcdef0123456789abcdef"
WITH_KEY = {**JSON, "x-api-key": KEY}
TABLES, ARROW = "/predict", {"content-type": "application/vnd.apache.arrow.stream", "x-api-key": KEY}
ALONE = {"MLNB_KEYS": f"predict:{KEY}", "MLNB_SERVE_FROM": "models:/speed", "MLNB_LOG_COMPACT_MINUTES": "0"}
EVERYTHING = {**ALONE, "MLNB_CHALLENGER_PERCENT": "10"}
SHADOW = {**ALONE, "MLNB_SHADOW": "true"}
VERSIONS = {1: "v1", 2: "v2"}  # registered, by number: the first is the champion
SETTINGS = """[project]
name = "speed"

[tool.mlnb]
bundle = "products/v1"
"""


def project(folder: Path) -> Path:
    """A project with two versions of the model in its registry."""
    shutil.copytree(BENCHMARK_FOLDER / "speed", folder / "speed", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(SETTINGS)
    done = subprocess.run(python("-m", "speed.build"), cwd=folder, env=of_ours(folder), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the model could not be made:\n{done.stderr}")
    return folder


def registry(root: Path):
    """The project's registry, connected."""
    from mlnb.models.registry import Tracking

    tracking = Tracking(f"sqlite:///{root}/.mlnb/mlflow.db")
    assert tracking.aliases("speed")
    return tracking


def of_ours(root: Path, **variables: str) -> dict[str, str]:
    """Variables of a process in the project: its package and this mlnb are imported."""
    return environment(
        PYTHONPATH=f"{root}:{BENCHMARK_FOLDER.parent}",
        MLNB_PREDICTIONS=str(root / "log" / str(free_port())),
        **variables,
    )


def under_uvicorn(root: Path, **variables: str) -> Server:
    """Ours under uvicorn alone."""
    command = python("-m", "mlnb.cli.main", "serve", "--no-bento", "--port", "{port}")
    return Server("mlnb serve --no-bento", command, root, of_ours(root, **(variables or EVERYTHING)), headers=WITH_KEY)


def under_bentoml(root: Path) -> Server:
    """Ours under `bentoml serve`."""
    command = python("-m", "mlnb.cli.main", "serve", "--development", "--port", "{port}")
    return Server("mlnb serve", command, root, of_ours(root, **EVERYTHING), headers=WITH_KEY)


def as_factory(root: Path, name: str) -> Server:
    """One of the applications in speed/apps.py under uvicorn."""
    command = python(
        "-m",
        "uvicorn",
        "--factory",
        f"speed.apps:{name}",
        "--no-access-log",
        "--log-level",
        "warning",
        "--port",
        "{port}",
    )
    return Server(name, command, root, of_ours(root, **EVERYTHING), headers=WITH_KEY)


# The peers, each with one worker.


def with_model(root: Path, **more: str) -> dict[str, str]:
    return environment(MODEL=str(root / "products/v1/model"), **more)


def fastapi(root: Path) -> Server:
    command = python(
        "-m", "uvicorn", "fastapi_app:app", "--no-access-log", "--log-level", "warning", "--port", "{port}"
    )
    return Server("FastAPI", command, root, with_model(root))


def bentoml(root: Path) -> Server:
    command = python("-m", "bentoml", "serve", "bentoml_service:Peer", "--port", "{port}", "--host", "127.0.0.1")
    store = with_model(root, BENTOML_HOME=str(root / "stock"))
    return Server("a stock BentoML endpoint", [*command, "--working-dir", str(BENCHMARK_FOLDER / "peers")], root, store)


def litserve(root: Path) -> Server:
    command = [str(needs.peer("litserve")), str(BENCHMARK_FOLDER / "peers/litserve_server.py"), "{port}"]
    return Server("LitServe", command, root, with_model(root), ready="/health")


def mlserver(root: Path) -> Server:
    (folder := root / "mlserver").mkdir(exist_ok=True)
    (folder / "model-settings.json").write_text('{"name": "speed", "implementation": "mlserver_model.Peer"}')
    settings = {
        "HTTP_PORT": "{port}",
        "GRPC_PORT": str(free_port()),
        "METRICS_PORT": str(free_port()),
        "HOST": "127.0.0.1",
    }
    settings |= {"PARALLEL_WORKERS": "0", "DEBUG": "false"}
    variables = with_model(root, **{f"MLSERVER_{name}": value for name, value in settings.items()})
    command = [str(needs.peer("mlserver")), "start", "."]
    return Server(
        "MLServer",
        command,
        folder,
        variables,
        "/v2/models/speed/infer",
        "/v2/health/ready",
        to_request=as_v2,
        to_probability=from_v2,
    )


def as_v2(row: dict) -> dict:
    kinds = {str: "BYTES", float: "FP64"}
    return {"inputs": [{"name": k, "shape": [1], "datatype": kinds[type(v)], "data": [v]} for k, v in row.items()]}


def from_v2(answer: dict) -> float:
    return next(o["data"][0] for o in answer["outputs"] if o["name"] == "probability")


def mlflow(root: Path) -> Server:
    if not (folder := root / "mlflow").exists():
        command = python(str(BENCHMARK_FOLDER / "peers/mlflow_model.py"), str(folder))
        subprocess.run(command, cwd=root, env=with_model(root), check=True, stdout=sys.stderr)
    command = python(
        "-m", "mlflow", "models", "serve", "--model-uri", str(folder), "--env-manager", "local", "--port", "{port}"
    )
    to_probability = lambda answer: answer["predictions"][0]["probability"]
    to_request = lambda row: {"dataframe_records": [row]}
    return Server(
        "mlflow models serve",
        command,
        root,
        with_model(root),
        "/invocations",
        "/ping",
        to_request=to_request,
        to_probability=to_probability,
    )
