"""A real image, without a container engine: made by buildah, run as an unprivileged user, asked for predictions.

`make test-container` runs it. It takes minutes, root, and the Debian packages buildah and mmdebstrap. The base image
is made of Debian's packages, the Python packages come from wherever pip finds them here, so that no registry of
images is needed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import toy_project
from waiting import free_port, wait_until_ready

from mlnb.serving.log_reader import read_predictions

MLNB = (sys.executable, "-m", "mlnb.cli.main")
BASE, IMAGE = "localhost/mlnb-test-base:latest", "localhost/mlnb-test:latest"
PROGRAM = "/home/bentoml/bento/env/docker/entrypoint.sh"
PYTHON = "python3,python3-venv,python3-pip,ca-certificates"


def log_line(text: str):
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(*command, **more) -> str:
    "What a command printed; ends this program if it fails"
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, **more)
    if done.returncode:
        raise SystemExit(f"failed with exit code {done.returncode}: {' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def make_base(folder: Path):
    "An image of Debian with Python"
    log_line("the base image, of Debian's packages")
    run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PYTHON}", "bookworm", folder / "base.tar")
    container = run("buildah", "from", "scratch").strip()
    run("buildah", "add", "--quiet", container, folder / "base.tar", "/")
    run("buildah", "commit", "--quiet", container, BASE)
    run("buildah", "rm", container)


def build_image(folder: Path) -> Path:
    "The project below `folder`, whose image is made"
    root = toy_project.make(folder / "project")
    shutil.copy(toy_project.REPOSITORY / "requirements.lock", root)
    environment = toy_project.environment(root)
    built = json.loads(run(*MLNB, "build", "--json", cwd=root, env=environment))
    log_line("the Python packages")
    requirements = Path(built["path"]) / "env/python/requirements.txt"
    run(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", folder / "wheels", "-r", requirements)
    log_line(f"the image, with {len(requirements.read_text().splitlines())} packages")
    where = (
        "--build-arg",
        "PIP_NO_INDEX=1",
        "--build-arg",
        "PIP_FIND_LINKS=/wheels",
        "--build-opt",
        f"volume={folder}/wheels:/wheels:ro",
    )
    how = ("--engine", "buildah", "--base", BASE, "--image", IMAGE, "--build-opt", "isolation=chroot")
    print(run(*MLNB, "containerize", *how, *where, cwd=root, env=environment))
    return root


def ask(url: str, root: Path, data: Path):
    "The container answers as the pipeline did, and has logged it"
    samples = json.loads((root / "products/bundle/samples.json").read_text())
    answered = httpx.post(f"{url}/predict", json=samples["requests"], timeout=30)
    assert answered.status_code == 200, answered.text
    answers = answered.json()
    assert [a["probability"] for a in answers] == samples["outputs"]["probability"]
    logged = read_predictions(data / "predictions")
    assert sorted(logged["request_id"]) == sorted(a["request_id"] for a in answers)
    log_line(f"{len(answers)} samples answered bit for bit, and logged")


def check_rights(container: str):
    "The service's user may write to /data and /tmp and to nothing else"
    places = ("/", "/app/.venv", "/home/bentoml/bento", "/data", "/tmp")
    tried = "; ".join(f"touch {place}/x 2>/dev/null && echo {place}" for place in places)
    inside = run(
        "buildah", "run", "--isolation", "chroot", container, "--", "sh", "-c", f"id -u; {tried}; true"
    ).split()
    assert inside == ["1034", "/data", "/tmp"], inside
    log_line("the user is 1034 and can write to /data and /tmp alone")


def end(process: subprocess.Popen):
    "Ask the service to end, as an engine does, and see that it does so in order"
    (service,) = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "serve" in p.cmdline() and p.uids().real == 1034
    ]
    service.terminate()
    assert process.wait(60) == 0, process.returncode
    log_line("it ended in order when it was asked to")


def serve(root: Path, folder: Path):
    "Run the image and ask it"
    container, port, data = run("buildah", "from", IMAGE).strip(), free_port(), folder / "data"
    (data / "storage").mkdir(parents=True)
    shutil.copytree(root / ".mlnb/storage/context", data / "storage/context")
    run("chown", "-R", "1034:1034", data)
    run("buildah", "config", "--volume", "/data-", container)  # its own empty volume would hide ours from `buildah run`
    command = [
        "buildah",
        "run",
        "--isolation",
        "chroot",
        "--volume",
        f"{data}:/data",
        "--env",
        f"PORT={port}",
        container,
        "--",
        PROGRAM,
    ]
    process = subprocess.Popen(command)
    try:
        started = time.monotonic()
        url = wait_until_ready(process, f"http://127.0.0.1:{port}")
        log_line(f"ready after {time.monotonic() - started:.1f} s")
        ask(url, root, data)
        health = json.loads(run("buildah", "inspect", "--type", "image", IMAGE))["Docker"]["config"]["Healthcheck"][
            "Test"
        ]
        run("buildah", "run", "--isolation", "chroot", "--env", f"PORT={port}", container, "--", *health[1:])
        log_line("the health check of the image is content")
        end(process)
        check_rights(container)
    finally:
        process.kill()
        process.wait()
        run("buildah", "rm", container)


def size() -> int:
    "Bytes of the image"
    return json.loads(run("buildah", "images", "--json", IMAGE))[0]["size"]


def main():
    if os.geteuid():
        raise SystemExit("building without an engine needs root; run: sudo make test-container")
    if missing := [name for name in ("buildah", "mmdebstrap") if not shutil.which(name)]:
        raise SystemExit(f"{' and '.join(missing)} not found; install: apt-get install {' '.join(missing)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mlnb-container-") as folder:
        make_base(Path(folder))
        root = build_image(Path(folder))
        build_seconds = time.monotonic() - started
        serve(root, Path(folder))
        log_line(f"image of {size()}, made in {build_seconds:.0f} s; all in {time.monotonic() - started:.0f} s")
        run("buildah", "rmi", IMAGE, BASE)


if __name__ == "__main__":
    main()
