"""Every command that the README shows is run as it stands there."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
PROGRAM = [sys.executable, "-m", "mlnb.cli.main"]


def lines(start: str) -> list[str]:
    return [line for line in LINES if line.startswith(start)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of this project with its products, so that what the README does changes nothing here."""
    if not (ROOT / "products" / "flights" / "bundle" / "bundle.json").exists():
        pytest.fail("the reference pipeline has not run; make products")
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    copy = tmp_path / "project"
    for name in [*known.stdout.splitlines(), *map(str, (p.relative_to(ROOT) for p in _kept()))]:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setenv("PYTHONPATH", str(copy))
    for variable in [
        v for v in os.environ if v.startswith("MLNB_") and v not in {"MLNB_TRACK_RUNS", "MLNB_RUNTIME_DIR"}
    ]:
        monkeypatch.delenv(variable)
    return copy


def _kept():
    """Products, their records, and snapshots."""
    for folder in ("products", ".mlnb/tasks", ".mlnb/storage"):
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file())


def run(line: str, cwd: Path) -> str:
    program, *words = shlex.split(line)
    assert program == "mlnb"
    done = subprocess.run([*PROGRAM, *words], cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_first_two_commands_are_targets():
    assert LINES[:2] == ["make demo", "make test"]
    for line in LINES[:2]:
        subprocess.run(["make", "--dry-run", line.split()[1]], cwd=ROOT, check=True, capture_output=True)


def test_every_line_is_of_a_kind_that_is_run_here():
    known = ("make ", "mlnb plan", "mlnb run", "mlnb build", "mlnb serve", "mlnb drift", "mlnb check", "mlnb doctor")
    known = (*known, "mlnb predictions", "mlnb performance", "mlnb alerts list", "mlnb new", "cd ", "curl ")
    assert [line for line in LINES if not line.startswith(known)] == []


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_its_rules_and_channels_are_some(tmp_path):
    """The TOML of the README is what settings take, and every channel that a rule names is there."""
    from mlnb.monitoring.channels import check_rule_channels, load_channels
    from mlnb.monitoring.rules import load_rules
    from mlnb.project.settings import load_settings

    (block,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    (tmp_path / "pyproject.toml").write_text(f'[tool.mlnb]\npackage = "delays"\n\n{block}')
    (tmp_path / "delays").mkdir()
    settings = load_settings(tmp_path)
    check_rule_channels(load_rules(settings), load_channels(settings))


def test_pipeline_build_serve_and_drift(project):
    """In the order of the README; `mlnb serve` runs while the request of the next block is sent."""
    pipeline = list(dict.fromkeys(lines("mlnb run")))
    assert pipeline[0] == "mlnb run"
    for line in [*lines("mlnb plan"), *pipeline, *lines("mlnb build"), *lines("mlnb check"), *lines("mlnb doctor")]:
        run(line, project)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = shlex.split(lines("mlnb serve")[0])[1:]
    log = (project / "serve.log").open("w")
    service = subprocess.Popen(
        [*PROGRAM, *words, "--port", str(port)], cwd=project, stdout=log, stderr=log, start_new_session=True
    )
    try:
        answers = {line.split()[1]: ask(line, port, service, project / "serve.log") for line in lines("curl ")}
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(timeout=60)
        log.close()
    answer, written = answers.values()
    assert written == {"written": 1} and 0 < answer["probability"] < 1
    assert {"decision", "model_version", "context_age_seconds", "request_id"} <= set(answer)
    for line in [
        *lines("mlnb drift"),
        *lines("mlnb predictions"),
        *lines("mlnb performance"),
        *lines("mlnb alerts list"),
    ]:
        run(line, project)
    page = (project / "products" / "flights" / "drift.html").read_text()
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["']https?://""", page)


def test_a_project_of_your_own(tmp_path, monkeypatch):
    """Its first `mlnb run` is that of `tests/test_template.py`, from a wheel."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    start = LINES.index(lines("mlnb new")[0])
    assert LINES[start + 1 :] == ["cd delays", "mlnb run"]
    run(LINES[start], tmp_path)
    assert "● the pipeline is what it should be" in run("mlnb check", tmp_path / LINES[start + 1].removeprefix("cd "))


def ask(line: str, port: int, service: subprocess.Popen, log: Path) -> dict:
    """What the request of a curl line is answered, sent to `port` once the service is ready."""
    words = shlex.split(line)
    url = words[1].replace(":3000/", f":{port}/")
    assert url != words[1]
    for _ in range(600):
        assert service.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2).close()
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    name, value = words[words.index("-H") + 1].split(": ")
    request = urllib.request.Request(url, words[words.index("-d") + 1].encode(), {name: value})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        raise AssertionError(e.read().decode()) from None
