import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import toy_project
import warm_cli
from uvicorn_process import run_server
from waiting import free_port, until, wait_until_ready

from mlnb.models.bundle import Bundle
from mlnb.models.registry import Tracking
from mlnb.project.errors import ServingError
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.server import _with_old_names
from mlnb.serving.worker import has_code_of_0_1, verify_bento

MLNB = (sys.executable, "-c", "from mlnb.cli.main import main; main()")


def mlnb(root, *arguments):
    "`mlnb ARGUMENTS` in the project below `root`, whose package is not installed"
    env = toy_project.environment(root)
    del env["PYTHONPATH"]
    return warm_cli.run(arguments, cwd=root, env=env)


@pytest.fixture(scope="module")
def built(toy, tmp_path_factory):
    "A project with a built Bento, and what `mlnb build --json` said"
    root = shutil.copytree(toy, tmp_path_factory.mktemp("built") / "project")
    (lock := root / "toy/.#model.py").symlink_to("me@machine.1234:5678")  # as Emacs locks a file
    os.mkfifo(pipe := root / "toy/pipe")
    done = mlnb(root, "build", "--json")
    assert done.returncode == 0, done.stderr
    lock.unlink()
    pipe.unlink()
    return root, json.loads(done.stdout)


@pytest.fixture
def serve(built):
    "Starts `mlnb serve` with arguments; ends it afterwards, with all that it started"
    started = []

    def start(*arguments, **variables):
        port = free_port()
        env = toy_project.environment(built[0]) | variables
        del env["PYTHONPATH"]
        process = subprocess.Popen([*MLNB, "serve", "--port", str(port), *arguments], cwd=built[0], env=env)
        started.append(process)
        url = wait_until_ready(process, f"http://127.0.0.1:{port}")
        return process, url, family(process.pid)

    yield start
    for process in started:
        for one in family(process.pid):
            one.kill()
        process.wait()


def family(pid: int) -> list[psutil.Process]:
    "The process and its children"
    try:
        return [parent := psutil.Process(pid), *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def test_what_a_bento_holds(built):
    root, told = built
    assert told["model"] == "toy" and told["samples"] == 12 and told["tag"].startswith("toy:")
    source = root / ".mlnb/bentoml/bentos" / told["tag"].replace(":", "/") / "src"
    assert sorted(p.name for p in source.iterdir() if p.name != "bentofile.yaml") == [
        "bundle", "mlnb", "pyproject.toml", "requirements.lock", "toy",
    ]  # fmt: skip
    assert Bundle.load(source / "bundle").self_test() == 12
    about = (source.parent / "bento.yaml").read_text()
    assert "problem: binary" in about and "answer: probability (number), decision (boolean)" in about
    assert {p.name for p in source.glob("toy/*.*")} == {"__init__.py", "bundle.py", "features.py", "model.py"}


def test_building_again_does_not_pack_the_first(built):
    root, told = built
    again = json.loads(mlnb(root, "build", "--json").stdout)
    assert again["tag"] != told["tag"] and again["megabytes"] == pytest.approx(told["megabytes"], rel=0.1)


def test_building_from_another_folder(built, tmp_path):
    root, _ = built
    other = shutil.copytree(root / "products/bundle", tmp_path / "other")
    assert json.loads(mlnb(root, "build", "--json", "--bundle", str(other)).stdout)["samples"] == 12
    (other / "samples.json").unlink()
    done = mlnb(root, "build", "--bundle", str(other))
    assert done.returncode == 1 and "samples.json is missing" in done.stderr and "Traceback" not in done.stderr


def test_a_bento_answers_as_the_pipeline_did_with_two_workers(built, serve):
    root, _ = built
    samples = Bundle.load(root / "products/bundle").samples
    process, url, everyone = serve("--workers", "2")
    assert len(everyone) >= 3
    answers = toy_project.post(f"{url}/predict", json=samples["requests"]).json()
    assert [answer["probability"] for answer in answers] == samples["outputs"]["probability"]
    answers = [toy_project.post(f"{url}/predict", json=samples["requests"][i % 12]).json() for i in range(60)]
    logged = read_predictions(root / ".mlnb/predictions").set_index("request_id")
    assert [logged.loc[a["request_id"], "probability"] for a in answers] == [a["probability"] for a in answers]
    wrong = toy_project.post(f"{url}/predict", json=samples["requests"][0] | {"distance": None})
    assert wrong.status_code == 400 and wrong.json()["fields"][0]["field"] == "distance"
    assert (
        toy_project.get(f"{url}/docs.json").json()["info"]["title"] == "toy"
        and toy_project.get(f"{url}/livez").status_code == 200
    )
    counted = [
        line
        for line in toy_project.get(f"{url}/metrics").text.splitlines()
        if line.startswith('mlnb_requests_total{status="200"')
    ]
    assert counted == ['mlnb_requests_total{status="200",validity="valid"} 61.0']
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not psutil.wait_procs(everyone, timeout=60)[1]


def by_hand(root: Path, *arguments, cwd: Path, **variables) -> tuple[subprocess.Popen, str]:
    "The program `bentoml serve`, started without `mlnb serve`, and the URL at which it will answer"
    port = free_port()
    env = toy_project.environment(root) | {"BENTOML_HOME": str(root / ".mlnb/bentoml")} | variables
    del env["PYTHONPATH"]
    command = [sys.executable, "-m", "bentoml", "serve", *map(str, arguments), "--port", str(port)]
    return subprocess.Popen(command, cwd=cwd, env=env, stderr=subprocess.PIPE, text=True), f"http://127.0.0.1:{port}"


def ended_by_hand(*arguments, **where) -> str:
    "What `bentoml serve` says that does not start: one sentence, and no worker is tried"
    process, _ = by_hand(*arguments, **where)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and len(said.splitlines()) == 1, said
    return said


def answered_by_hand(root: Path, *arguments, **where) -> str:
    "The id of a request that `bentoml serve` has answered"
    process, url = by_hand(root, *arguments, **where)
    try:
        wait_until_ready(process, url)
        answer = toy_project.post(f"{url}/predict", json=toy_project.example(root))
        assert answer.status_code == 200, answer.text
        return answer.json()["request_id"]
    finally:
        everyone = family(process.pid)
        process.terminate()
        process.communicate(timeout=60)
        assert not psutil.wait_procs(everyone, timeout=60)[1]


def test_bentoml_serve_does_not_start_where_it_would_write_into_the_bento(built, tmp_path):
    root, told = built
    said = ended_by_hand(root, told["tag"], cwd=root)
    assert "storage, predictions, labels are relative to the Bento in" in said
    right = f"to absolute folders or URLs, or MLNB_ROOT to the project's folder, {root}"
    assert f"set MLNB_STORAGE, MLNB_PREDICTIONS, MLNB_LABELS {right}" in said
    elsewhere = shutil.copytree(told["path"], tmp_path / "another machine")
    places = {"MLNB_STORAGE": "s3://team/toy", "MLNB_PREDICTIONS": "predictions", "MLNB_LABELS": str(tmp_path)}
    said = ended_by_hand(root, elsewhere, cwd=tmp_path, **places)
    assert (
        "predictions is relative to the Bento in" in said
        and "set MLNB_PREDICTIONS to absolute" in said
        and str(root) not in said
    )
    said = ended_by_hand(
        root, elsewhere, cwd=tmp_path, **places | {"MLNB_PREDICTIONS": "/x", "MLNB_SERVE_FROM": "models:/toy"}
    )
    assert "set MLNB_TRACKING, MLNB_MODEL_CACHE to absolute" in said
    assert not [p for p in (elsewhere / "src").iterdir() if p.name == ".mlnb"]


def test_what_no_worker_could_do_ends_bentoml_serve_with_one_sentence(built, tmp_path):
    root, told = built
    start = partial(ended_by_hand, root, told["tag"], cwd=tmp_path)
    assert "no project at or above" in start(MLNB_ROOT="/no/such/folder")
    assert "no API key is set" in start(MLNB_ROOT=str(root), MLNB_KEYS_REQUIRED="true")
    assert "setting 'storage': s4://x cannot be opened" in start(MLNB_ROOT=str(root), MLNB_STORAGE="s4://x")
    broken = Path(shutil.copytree(told["path"], tmp_path / "broken"))
    (broken / "src/bundle/samples.json").write_text("{}")
    said = ended_by_hand(root, broken, cwd=tmp_path, MLNB_ROOT=str(root))
    assert f"the Bento in {broken} cannot be served" in said and "samples.json" in said


def test_bentoml_serve_writes_where_the_project_looks(built):
    root, told = built
    answered = answered_by_hand(root, told["tag"], cwd=root, MLNB_ROOT=".", MLNB_WORKERS="2")
    assert answered in set(read_predictions(root / ".mlnb/predictions")["request_id"])


def test_a_bento_on_another_machine_writes_where_its_variables_say(built, tmp_path):
    root, told = built
    elsewhere = shutil.copytree(told["path"], tmp_path / "bento")
    places = {f"MLNB_{name.upper()}": str(tmp_path / name) for name in ("storage", "predictions", "labels")}
    shutil.copytree(root / ".mlnb/storage", tmp_path / "storage")
    assert answered_by_hand(root, elsewhere, cwd=tmp_path, **places) in set(
        read_predictions(tmp_path / "predictions")["request_id"]
    )
    assert not (elsewhere / "src/.mlnb").exists()


def test_servers_of_one_store_count_apart(built, serve):
    counts = lambda url: toy_project.get(f"{url}/metrics").text.count(
        'mlnb_requests_total{status="200",validity="valid"} 1.0'
    )
    _, first, _ = serve()
    assert toy_project.post(f"{first}/predict", json=toy_project.example(built[0])).status_code == 200
    _, second, _ = serve()
    assert (counts(first), counts(second)) == (1, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind(serve, number):
    process, _, everyone = serve()
    os.kill(process.pid, number)
    process.wait(60)
    assert not psutil.wait_procs(everyone, timeout=60)[1]


# A Python that stands still where the test wants it to, before the first line of what it runs
STALLED = """
import os, sys, time
if "_bentoml_impl.worker.service" in sys.orig_argv:
    open(os.environ["STALLED"], "w").close()
    time.sleep(3600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone can be asked before the worker runs code of ours")
def test_a_worker_that_has_not_begun_to_import_ends_with_its_supervisor(built, tmp_path):
    root, _ = built
    (tmp_path / "sitecustomize.py").write_text(STALLED)
    env = toy_project.environment(root) | {"PYTHONPATH": str(tmp_path), "STALLED": str(tmp_path / "stalled")}
    command = [*MLNB, "serve", "--port", str(free_port())]
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: process.poll() is not None or (tmp_path / "stalled").exists(), "the worker")
        everyone = family(process.pid)
    finally:
        process.kill()
        process.wait()
    assert len(everyone) == 3 and not psutil.wait_procs(everyone, timeout=60)[1]  # the compactor too


def test_the_project_as_it_lies_there(built, serve):
    _, url, _ = serve("--development")
    assert toy_project.post(f"{url}/predict", json=toy_project.example(built[0])).json()["model_version"] == "v1"


def test_the_guard_stands_under_bentoml_too(built, serve):
    _, url, _ = serve(MLNB_KEYS="predict:correct-horse-battery", MLNB_BODY_LIMIT_KB="16")
    row, key = toy_project.example(built[0]), {"x-api-key": "correct-horse-battery"}
    assert all(
        toy_project.post(f"{url}{path}", json=row).status_code == 401 for path in ("/predict", "/predict/columns")
    )
    assert toy_project.post(f"{url}/predict", json=row, headers=key).status_code == 200
    table = {name: [value] * 3 for name, value in row.items()}
    assert len(toy_project.post(f"{url}/predict/columns", json=table, headers=key).json()["probability"]) == 3
    chunks = (b" " * 4096 for _ in range(5))
    answer = toy_project.post(f"{url}/predict", content=chunks, headers=key | {"content-type": "application/json"})
    assert answer.status_code == 413 and "server" not in answer.headers
    assert toy_project.get(f"{url}/metrics").status_code == toy_project.get(f"{url}/docs.json").status_code == 401
    counts = toy_project.get(f"{url}/metrics", headers=key)
    assert counts.status_code == 200 and 'mlnb_requests_total{status="200",validity="valid"}' in counts.text
    for path in (
        "/",
        "/schema.json",
        "/docs.json",
        "/openapi.json",
        "/healthz",
        "/invocations",
        "/static_content/index.html",
        "/nothing",
    ):
        found = toy_project.get(f"{url}{path}")  # BentoML answers some of these itself, to anybody
        assert found.status_code in (401, 404) and list(found.json()) == ["error"]
    for path in ("/livez", "/readyz"):
        assert httpx.head(f"{url}{path}", timeout=60).status_code == toy_project.get(f"{url}{path}").status_code == 200
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=60) as caller, pytest.raises(ConnectionError):
        caller.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        for _ in range(1000):
            caller.sendall(b"X-Trailer: aaaaaaaaaaaaaaaaaa\r\n" * 2000)


@pytest.mark.long
def test_bentoml_cuts_off_no_slow_body(serve):
    _, url, _ = serve(MLNB_REQUEST_TIMEOUT_SECONDS="60")
    body = b'{"entity": "UA/1", "value": 1}'
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60) as caller:
        caller.sendall(
            b"POST /outcomes HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:10]
        )
        time.sleep(4)  # longer than BentoML waits
        caller.sendall(body[10:])
        assert caller.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.long
def test_callers_who_stall_are_cut_off_under_bentoml_too(serve, built):
    _, url, _ = serve(MLNB_REQUEST_TIMEOUT_SECONDS="10")
    row, where = toy_project.example(built[0]), urlsplit(url)
    heads = (
        b"",
        b"POST /pre",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ",
    )
    stalled = [socket.create_connection((where.hostname, where.port), timeout=60) for _ in range(200)]
    for number, caller in enumerate(stalled):
        caller.sendall(heads[number % len(heads)])
    assert all(toy_project.post(f"{url}/predict", json=row).status_code == 200 for _ in range(20))
    for caller in stalled:
        with caller:
            assert caller.recv(65536).startswith(b"HTTP/1.1 408") and caller.recv(1) == b""
    with socket.create_connection((where.hostname, where.port), timeout=60) as endless:
        endless.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000)
        assert endless.recv(65536).startswith(b"HTTP/1.1 431")


@pytest.mark.long
def test_idle_connections_do_not_keep_others_out_of_bentoml_for_long(serve, built):
    process, url, _ = serve(MLNB_REQUEST_TIMEOUT_SECONDS="20")
    where = urlsplit(url)
    idle = [socket.create_connection((where.hostname, where.port), timeout=60) for _ in range(1010)]
    refused = idle[-5:]
    assert all(caller.recv(65536).startswith(b"HTTP/1.1 503") for caller in refused)
    assert all(caller.recv(65536).startswith(b"HTTP/1.1 408") for caller in idle[:990])
    for caller in idle:
        caller.close()
    wait_until_ready(process, url)
    assert toy_project.post(f"{url}/predict", json=toy_project.example(built[0])).status_code == 200


def test_what_the_registry_releases_is_served_although_the_bundle_in_the_bento_is_broken(built, serve, tmp_path, toy):
    from toy.bundle import build

    tracking = Tracking(f"sqlite:///{tmp_path}/mlflow.db")
    with tracking.run("toy") as run:
        number = tracking.register("toy", build(tmp_path / "v7", "v7").folder, run)
    tracking.set_alias("toy", "champion", number)
    follow = {
        "MLNB_SERVE_FROM": "models:/toy",
        "MLNB_TRACKING": tracking.url,
        "MLNB_MODEL_CACHE": str(tmp_path / "versions"),
    }
    root, told = built
    samples = root / ".mlnb/bentoml/bentos" / told["tag"].replace(":", "/") / "src/bundle/samples.json"
    kept = samples.read_bytes()
    samples.write_bytes(kept + b" ")
    try:
        _, url, _ = serve("--bento", told["tag"], **follow)
        assert toy_project.post(f"{url}/predict", json=toy_project.example(root)).json()["model_version"] == "v7"
        wanted = {"challenger_percent": 5, "shadow": True}
        answer = toy_project.put(f"{url}/routing", json=wanted).json()
        assert answer == wanted | {
            "source": "request",
            "said_by": "request",
            "versions": {"champion": "v7"},
            "problem": None,
        }
    finally:
        samples.write_bytes(kept)
    with run_server(root, tmp_path / "log", MLNB_BUNDLE="no/such/folder", **follow) as (_, url):
        assert toy_project.post(f"{url}/predict", json=toy_project.example(root)).json()["model_version"] == "v7"


def test_an_old_bento_is_served_with_a_word(built, tmp_path):
    root = shutil.copytree(built[0], tmp_path / "project")
    assert toy_project.run(root, "-m", "toy.bundle", "v2").returncode == 0
    env = {k: v for k, v in toy_project.environment(root).items() if k != "PYTHONPATH"}
    words = [*MLNB, "serve", "--port", str(free_port())]
    process = subprocess.Popen(words, cwd=root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.readline()
    everyone = family(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert "of model v1 (the project has v2 by now; mlnb build would pack it)" in said
    assert not psutil.wait_procs(everyone, timeout=60)[1]


def test_a_bento_that_changed_is_not_served(built):
    root, told = built
    samples = root / ".mlnb/bentoml/bentos" / told["tag"].replace(":", "/") / "src/bundle/samples.json"
    kept = samples.read_bytes()
    samples.write_bytes(kept + b" ")
    done = mlnb(root, "serve", "--bento", told["tag"], "--port", str(free_port()))
    samples.write_bytes(kept)
    assert (
        done.returncode == 1
        and "cannot be served" in done.stderr
        and "samples.json has changed since it was written" in done.stderr
    )


def test_a_bento_of_release_0_1_is_verified_and_served_by_its_own_names(tmp_path):
    source = tmp_path / "src"
    for module, code in {
        "models/bundle.py": "class Bundle:\n    load = str.upper\n",
        "serving/proof.py": "def prove(bundle):\n"
        "    assert bundle == 'BUNDLE' and not open('wrong').read(), 'it is wrong'\n",
    }.items():
        (file := source / "mlnb" / module).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    (source / "wrong").write_text("")
    assert has_code_of_0_1(source)
    verify_bento(source)
    (source / "wrong").write_text("yes")
    with pytest.raises(ServingError, match="cannot be served: AssertionError: it is wrong"):
        verify_bento(source)
    old = _with_old_names({"MLNB_LABELS": "/labels", "MLNB_SNAPSHOT_MAX_AGE_MINUTES": "60"})
    assert old["MLNB_OUTCOMES"] == "/labels" and old["MLNB_CONTEXT_LIMIT_MINUTES"] == "60"
