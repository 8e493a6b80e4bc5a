"""JupyterLab opens notebooks although Ploomber, whose server extension cannot, is installed beside it."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from pipeline_project import make
from waiting import free_port, wait_until_ready

OURS = Path(__file__).parent.parent / "jupyter" / "etc"


@pytest.fixture
def settings(tmp_path):
    "Jupyter's settings as an installed wheel leaves them: Ploomber's files and ours in one folder"
    folder = tmp_path / "etc"
    shutil.copytree(OURS, folder)
    for name in ("ploomber", "ploomber_extension"):
        theirs = Path(sys.prefix, "etc", "jupyter", "jupyter_server_config.d", f"{name}.json")
        assert theirs.exists(), "Ploomber no longer switches its extension on: these settings may go"
        shutil.copy(theirs, folder / "jupyter_server_config.d")
    return folder


@pytest.fixture
def lab(settings, tmp_path):
    "A running JupyterLab on a small pipeline project: its address"
    port, home = free_port(), tmp_path / "home"
    home.mkdir()
    root = make(tmp_path / "project")
    options = [
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.token=",
        f"--ServerApp.root_dir={root}",
    ]
    program = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", *options]
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_PATH": str(settings),
        "HOME": str(home),
        "JUPYTER_RUNTIME_DIR": str(home),
    }
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(program, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        yield wait_until_ready(process, address, "/api/status")
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def get(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.status, answer.read().decode()


def test_a_task_notebook_opens_and_ploomber_has_no_button(lab):
    status, body = get(f"{lab}/api/contents/nbs/first.ipynb")
    assert status == 200
    notebook = json.loads(body)["content"]
    assert [c["id"] for c in notebook["cells"]] == ["c0", "c1"]
    _, page = get(f"{lab}/lab")
    config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert "ploomber-extension" in config["disabledExtensions"]
