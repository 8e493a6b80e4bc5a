import fcntl
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import pytest
import toy_project
from waiting import free_port, is_alive, until, wait_until_ready

from mlnb.data.fields import Field
from mlnb.models import watcher
from mlnb.models.bundle import Bundle
from mlnb.models.registry import Tracking
from mlnb.models.watcher import Watcher, ensure_watcher, read_releases, releases_folder
from mlnb.project.errors import BundleError, ServingError, TrackingError
from mlnb.project.files import write_atomic
from mlnb.project.settings import load_settings
from mlnb.serving import routing
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.routing import FollowingRouter, Router, Routing, RoutingFile, load_router, load_servable

SERVER = """
import sys
import uvicorn
from mlnb.project.settings import load_settings
from mlnb.serving.app import load_app


def create():
    return load_app(load_settings("."))


if __name__ == "__main__":
    uvicorn.run("server:create", factory=True, port=int(sys.argv[1]), workers=int(sys.argv[2]), log_level="warning")
"""
WEIGHTS = {"v1": (0.5, 0.05, -0.3, 0.4), "v2": (-0.5, 0.01, 0.2, 0.1), "v3": (0.1, 0.1, 0.1, 0.1)}


class Store:
    "An MLflow store of toy bundles, and the project that follows it"

    def __init__(self, project, root):
        from toy.bundle import REQUEST, build, samples

        self.project, self.root, self.numbers = project, root, {}
        self.tracking = Tracking(f"sqlite:///{root}/mlflow.db")
        for version, weights in WEIGHTS.items():
            self.register(version, build(root / "made" / version, version, weights=weights).folder)
        other = [*REQUEST, Field("gate", "string", "Gate", "A1")]
        rows = samples()
        rows.requests["gate"] = rows.requests["origin"]
        self.register("gated", build(root / "made/gated", "gated", request=other, samples=rows).folder)
        self.register("torn", self._torn(root / "made/torn", "model/weights.safetensors"))
        self.register("liar", self._liar(root / "made/liar"))
        self.release("v1")

    def _torn(self, folder, name):
        shutil.copytree(self.root / "made/v2", folder)
        with (folder / name).open("ab") as file:
            file.write(b"\0")
        return folder

    def _liar(self, folder):
        "A bundle whose files are whole, but whose samples are not what it computes"
        shutil.copytree(self.root / "made/v2", folder)
        samples = json.loads((folder / "samples.json").read_text())
        samples["outputs"]["probability"][3] += 1e-9
        (folder / "samples.json").write_text(json.dumps(samples))
        manifest = json.loads((folder / "bundle.json").read_text())
        manifest["files"]["samples.json"] = hashlib.sha256((folder / "samples.json").read_bytes()).hexdigest()
        (folder / "bundle.json").write_text(json.dumps(manifest))
        return folder

    def register(self, version, folder):
        with self.tracking.run("toy") as run:
            self.numbers[version] = self.tracking.register("toy", folder, run)

    def release(self, version, alias="champion"):
        self.tracking.set_alias("toy", alias, self.numbers[version])

    def variables(self, log, **more):
        return {
            "MLNB_SERVE_FROM": "models:/toy", "MLNB_TRACKING": self.tracking.url,
            "MLNB_MODEL_CACHE": str(self.root / "versions"),
            "MLNB_PREDICTIONS": str(log), "MLNB_REGISTRY_POLL_MILLISECONDS": "100", **more,
        }  # fmt: skip

    def settings(self, **more):
        about = {"serve_from": "models:/toy", "tracking": self.tracking.url, "registry_poll_milliseconds": 100}
        return replace(load_settings(self.project), **(about | {"model_cache": str(self.root / "versions")} | more))


@pytest.fixture(scope="module")
def store(toy, tmp_path_factory):
    return Store(toy, tmp_path_factory.mktemp("store"))


@contextmanager
def serving(store, log, workers=1, **more):
    "A uvicorn server that follows the store: its process and URL"
    port, root = free_port(), log.parent
    (root / "server.py").write_text(SERVER)
    env = toy_project.environment(store.project) | store.variables(
        log, **({"MLNB_REQUEST_TIMEOUT_SECONDS": "60"} | more)
    )
    env["PYTHONPATH"] += f":{root}"
    command = [sys.executable, str(root / "server.py"), str(port), str(workers)]
    with (root / "stderr").open("w") as stderr_file:
        process = subprocess.Popen(command, cwd=store.project, env=env, stderr=stderr_file)
    try:
        yield process, wait_until_ready(process, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


class Load:
    "Clients that ask without a pause; what they were answered"

    def __init__(self, url, row, clients=3):
        self.answers, self.errors, self._enough = [], [], threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, row, i)) for i in range(clients)]

    def _ask(self, url, row, who):
        with httpx.Client(base_url=url, timeout=60) as http:
            number = 0
            while not self._enough.is_set():
                number += 1
                try:
                    answer = http.post("/predict", json=row | {"flight": who * 1_000_000 + number})
                    self.answers.append(answer.json()) if answer.status_code == 200 else self.errors.append(answer.text)
                except httpx.TransportError as e:
                    self.errors.append(repr(e))

    def __enter__(self):
        for t in self._threads:
            t.start()
        return self

    def __exit__(self, *_):
        self._enough.set()
        for t in self._threads:
            t.join()


def test_versions_change_under_load_without_an_error(store, tmp_path):
    store.release("v1")
    row = toy_project.example(store.project)
    with serving(store, tmp_path / "log", workers=2) as (_, url), Load(url, row) as load:
        until(lambda: len(load.answers) > 100)
        for version in ("v2", "v3", "v1"):
            store.release(version)
            until(
                lambda version=version: (
                    len(load.answers) > 50 and {a["model_version"] for a in load.answers[-50:]} == {version}
                )
            )
    assert not load.errors
    logged = read_predictions(tmp_path / "log").set_index("request_id")
    assert logged.index.is_unique and set(logged.index) == {a["request_id"] for a in load.answers}
    logged = logged.loc[[a["request_id"] for a in load.answers]]
    for column in ("model_version", "arm", "probability"):
        assert logged[column].tolist() == [a[column] for a in load.answers]
    assert logged.groupby("model_version")["probability"].nunique().to_dict() == {"v1": 1, "v2": 1, "v3": 1}


@pytest.mark.long
def test_what_is_not_fit_stays_out_and_the_store_may_go(store, tmp_path):
    store.release("v1")
    row = toy_project.example(store.project)
    messages = lambda: "".join(
        file.read_text() for file in tmp_path.rglob("stderr")
    )  # of both servers: either may ask for both
    with serving(store, tmp_path / "log") as (_, url), Load(url, row, clients=1) as load:
        for version, why in (
            ("torn", "has changed since it was written"),
            ("liar", "fails its self-test"),
            ("gated", "a service of their own"),
        ):
            store.release(version)
            until(lambda why=why: why in messages())
        seen = len(load.answers)
        until(lambda: len(load.answers) > seen + 50)
        assert {a["model_version"] for a in load.answers} == {"v1"}
        store.release("v2")
        until(lambda: load.answers[-1]["model_version"] == "v2")
        away = (store.root / "mlflow.db").rename(store.root / "away.db")
        try:
            (store.root / "mlflow.db").mkdir()
            until(lambda: messages().count("is still served") == 4)
            seen = len(load.answers)
            until(lambda: len(load.answers) > seen + 50)
            with serving_again(store, tmp_path) as again:
                assert httpx.post(f"{again}/predict", json=row).json()["model_version"] == "v2"
        finally:
            (store.root / "mlflow.db").rmdir()
            away.rename(store.root / "mlflow.db")
        store.release("v3")
        until(lambda: load.answers[-1]["model_version"] == "v3")
    assert (
        not load.errors and messages().count("is still served") == 4 and messages().count("can be followed again") == 2
    )
    assert set(read_predictions(tmp_path / "log")["request_id"]) == {a["request_id"] for a in load.answers}


@contextmanager
def serving_again(store, root):
    "Another server of the same project, started while the store is away"
    (root / "again").mkdir()
    with serving(store, root / "again/log") as (_, url):
        yield url


def test_a_challenger_comes_and_goes(store, tmp_path):
    store.release("v1")
    router = load_router(store.settings(predictions=str(tmp_path / "log"), challenger_percent=50, shadow=True))
    try:
        assert router.versions == {"champion": "v1"}
        store.release("v2", "challenger")
        until(lambda: router.versions == {"champion": "v1", "challenger": "v2"})
        folder = router.arms.challenger.bundle.folder
        store.release("v2")  # it has won
        until(lambda: router.versions == {"champion": "v2", "challenger": "v2"})
        assert router.bundle.folder == folder and router.arms.challenger.bundle is router.bundle
        store.tracking.client.delete_registered_model_alias("toy", "challenger")
        until(lambda: router.versions == {"champion": "v2"} and router.arms.shadow is None)
        assert router.counts["swaps"] == 3 and router.problem is None
        store.tracking.client.delete_registered_model_alias("toy", "champion")
        until(lambda: router.problem)
        assert (
            "no alias 'champion'" in router.problem
            and "set_registered_model_alias('toy', 'champion', VERSION)" in router.problem
        )
        assert router.versions == {"champion": "v2"}
    finally:
        router.stop()
        store.release("v1")


KEYS = {"MLNB_KEYS": "predict:predicts-and-no-more,admin:changes-what-answers"}
PREDICT, ADMIN = {"x-api-key": "predicts-and-no-more"}, {"x-api-key": "changes-what-answers"}


def share(url, row, number=200):
    "How many of `number` entities the challenger answers, asked over many connections so that every worker is heard"
    arms = [
        a["arm"]
        for start in range(0, number, 10)
        for a in httpx.post(
            f"{url}/predict", headers=PREDICT, json=[row | {"flight": start + i} for i in range(10)]
        ).json()
    ]
    return arms.count("challenger") / number


@pytest.fixture
def challenged(store):
    "The store with a champion and a challenger, and no routing asked for"
    store.release("v1")
    store.release("v2", "challenger")
    yield store
    store.tracking.client.delete_registered_model_alias("toy", "challenger")


@pytest.mark.long
def test_an_administrator_changes_the_routing_of_all_workers_and_a_restart_keeps_it(challenged, tmp_path):
    row = toy_project.example(challenged.project)
    more = KEYS | {"MLNB_MODEL_CACHE": str(tmp_path / "versions"), "MLNB_CHALLENGER_PERCENT": "10"}
    with serving(challenged, tmp_path / "log", workers=2, **more) as (_, url):
        state = httpx.get(f"{url}/routing", headers=ADMIN).json()
        assert (state["challenger_percent"], state["shadow"], state["source"]) == (10, False, "settings")
        assert httpx.get(f"{url}/routing").status_code == 401
        for method in ("GET", "PUT"):
            assert httpx.request(method, f"{url}/routing", headers=PREDICT).status_code == 403
        until(lambda: 0 < share(url, row) < 0.4)
        for percent, shadow in ((100, False), (0, False), (100, True)):
            change = {"challenger_percent": percent, "shadow": shadow}
            answer = httpx.put(f"{url}/routing", headers=ADMIN, json=change)
            assert answer.status_code == 200 and answer.json() | change == answer.json()
            until(lambda percent=percent: share(url, row) == percent / 100)
        bad = [b"", b"{}", b"[]", b"\xff", b'{"challenger_percent": 101, "shadow": true}', b'{"challenger_percent": 5}',
               b'{"challenger_percent": 5, "shadow": 1}', b'{"challenger_percent": 0.5, "shadow": true}',
               b'{"challenger_percent": 5, "shadow": true, "salt": 1}']  # fmt: skip
        for body in bad:
            answer = httpx.put(f"{url}/routing", headers=ADMIN, content=body)
            assert answer.status_code == 400 and "from 0 to 100" in answer.json()["error"], body
        assert httpx.delete(f"{url}/routing", headers=ADMIN).headers["allow"] == "GET, PUT, HEAD, OPTIONS"
        assert share(url, row) == 1
        challenged.release("liar")
        until(lambda: httpx.get(f"{url}/readyz").json()["problem"])
        problem = httpx.get(f"{url}/routing", headers=ADMIN).json()["problem"]
        assert "fails its self-test" in problem and str(tmp_path) not in httpx.get(f"{url}/readyz").text
        assert httpx.get(f"{url}/readyz").json()["problem"] != problem
        challenged.release("v1")
    with serving(challenged, tmp_path / "log", workers=2, **more) as (_, url):
        state = httpx.get(f"{url}/routing", headers=ADMIN).json()
        assert (state["challenger_percent"], state["shadow"], state["source"]) == (100, True, "request")
        until(lambda: share(url, row) == 1)


@pytest.mark.long
def test_a_change_of_the_routing_under_load_loses_nothing_and_two_at_once_leave_one_whole(challenged, tmp_path):
    row, versions = toy_project.example(challenged.project), tmp_path / "versions"
    with (
        serving(challenged, tmp_path / "log", workers=2, MLNB_MODEL_CACHE=str(versions)) as (_, url),
        Load(url, row) as load,
    ):
        until(lambda: len(load.answers) > 50)
        changes = [{"challenger_percent": percent, "shadow": percent % 2 == 1} for percent in (99, 100)]

        def change(which):
            for _ in range(30):
                assert httpx.put(f"{url}/routing", json=changes[which]).status_code == 200

        both = [threading.Thread(target=change, args=(i,)) for i in (0, 1)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        state = httpx.get(f"{url}/routing").json()
        assert {k: state[k] for k in changes[0]} in changes
        until(lambda: len(load.answers) > 50 and {a["arm"] for a in load.answers[-20:]} == {"challenger"})
    assert not load.errors
    logged = read_predictions(tmp_path / "log").set_index("request_id")
    logged = logged[logged["arm"] != "shadow"]
    assert logged.index.is_unique and set(logged.index) == {a["request_id"] for a in load.answers}
    assert logged.loc[[a["request_id"] for a in load.answers], "arm"].tolist() == [a["arm"] for a in load.answers]
    assert not list(versions.rglob("*.part"))


def test_a_torn_routing_file_changes_nothing_and_is_written_anew(challenged, tmp_path):
    settings = challenged.settings(
        predictions=str(tmp_path / "log"), model_cache=str(tmp_path / "versions"), challenger_percent=30
    )
    file = RoutingFile(settings)
    file.write(Routing(70, False))
    router = load_router(settings)
    try:
        assert router.routing == Routing(70, False)
        file.path.write_text('{"challenger_percent": 200, "sha')
        until(lambda: router.problem)
        assert "rewrite it with PUT /routing" in router.problem and str(tmp_path) not in router.problem
        assert router.routing == Routing(70, False)
        file.write(Routing(0, True))
        until(lambda: router.routing == Routing(0, True) and router.problem is None and router.arms.shadow)
        file.path.unlink()
        until(lambda: router.routing == Routing(30, False) and router.arms.shadow is None)
    finally:
        router.stop()


def test_a_version_that_one_worker_could_not_load_is_tried_again_there(store, tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "RETRY_BACKOFF_SECONDS", (0.05, 0.1, 0.2, 0.4, 0.8))
    settings = store.settings(predictions=str(tmp_path / "log"), model_cache=str(tmp_path / "versions"))
    folder = releases_folder(settings)
    shutil.copytree(store.root / "made/v1", folder / "1-a")
    shutil.copytree(store.root / "made/torn", folder / "2-b")
    champion, worse = watcher.ModelVersion(1, str(folder / "1-a")), watcher.ModelVersion(2, str(folder / "2-b"))
    tries = []
    monkeypatch.setattr(routing, "load_servable", lambda *where: tries.append(where[0]) or load_servable(*where))
    with (folder / "watcher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that nothing but this test says what is released
        say = lambda releases: write_atomic(folder / "releases.json", msgspec.json.encode(releases))
        say(watcher.Releases(champion))
        router = FollowingRouter(settings, read_releases(folder), None)
        try:
            say(watcher.Releases(worse))
            until(lambda: router.problem and len(tries) > 2)
            assert router.versions == {"champion": "v1"} and router.counts["refused"] == 1
            (folder / "2-b/model/weights.safetensors").write_bytes(
                (store.root / "made/v2/model/weights.safetensors").read_bytes()
            )
            until(lambda: router.versions == {"champion": "v2"})
            assert router.problem is None
            monkeypatch.setattr(routing, "RETRY_BACKOFF_SECONDS", (0.0, 0.0))
            tries.clear()
            broken = watcher.ModelVersion(3, str(store.root / "made/liar"))
            say(watcher.Releases(broken))
            until(lambda: len(tries) == 3)  # and no more
            seen = len(tries)
            say(watcher.Releases(broken, problem="another word, the same version"))
            time.sleep(5 * routing.POLL_SECONDS)
            assert len(tries) == seen and router.versions == {"champion": "v2"}
            say(watcher.Releases(champion))
            until(lambda: router.versions == {"champion": "v1"} and router.problem is None)
        finally:
            router.stop()


def test_one_watcher_at_a_time_and_a_dead_one_is_replaced(store, tmp_path):
    settings = store.settings(model_cache=str(tmp_path / "versions"))
    first = ensure_watcher(settings)
    try:
        assert ensure_watcher(settings) is None
        first.send_signal(signal.SIGKILL)
        first.wait()
        second = ensure_watcher(settings)
        assert second is not None
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_versions_that_cannot_be_kept(store, tmp_path):
    "Without any version the service says so; with one that was fetched before it answers, and goes on trying"
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match=r"file/versions.* \(setting 'model_cache'\) cannot be written"):
        load_router(store.settings(model_cache=str(tmp_path / "file/versions")))
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a disk that is then read-only")
    try:
        store.release("v1")
        settings = store.settings(model_cache=str(disk), predictions=str(tmp_path / "log"))
        Watcher(store.tracking, "toy", releases_folder(settings)).poll()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        router = load_router(settings)
        try:
            assert router.versions == {"champion": "v1"}
            until(lambda: "Read-only file system" in (router.problem or ""), "the problem")
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            store.release("v2")
            until(lambda: router.versions == {"champion": "v2"}, "the version")
        finally:
            router.stop()
            store.release("v1")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_watcher_ends_with_the_process_that_started_it(store, tmp_path):
    code = """
import sys, time
from dataclasses import replace
from pathlib import Path
from mlnb.models.watcher import ensure_watcher
from mlnb.project.settings import load_settings
print(ensure_watcher(replace(load_settings("."), serve_from="models:/toy", model_cache=sys.argv[1])).pid, flush=True)
time.sleep(600)
"""
    env = toy_project.environment(store.project)
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=store.project, env=env, stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until(lambda: not is_alive(pid))


def test_a_fetched_version_that_was_damaged_is_fetched_again(store, tmp_path):
    store.release("v1")
    follow = lambda: Watcher(store.tracking, "toy", tmp_path / "versions")
    follow().poll()
    folder = read_releases(tmp_path / "versions").champion.folder
    with open(f"{folder}/samples.json", "a") as file:
        file.write("x")
    follow().poll()
    assert read_releases(tmp_path / "versions").champion.folder == folder and Bundle.load(folder).self_test() == 12
    assert read_releases(tmp_path / "versions").problem is None


def test_a_fetch_that_was_cut_short_is_done_again(store, tmp_path, monkeypatch):
    store.release("v1")
    follow = Watcher(store.tracking, "toy", tmp_path / "versions")
    monkeypatch.setattr(watcher, "RETRY_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        follow.poll()
    assert "No space left" in read_releases(tmp_path / "versions").problem
    follow.poll()
    assert load_servable(read_releases(tmp_path / "versions").champion.folder).version == "v1"


def test_old_versions_are_removed(store, tmp_path, monkeypatch):
    monkeypatch.setattr(watcher, "UNUSED_VERSIONS_KEPT", 1)
    follow = Watcher(store.tracking, "toy", tmp_path / "versions")
    for version in ("v1", "v2", "v3"):
        store.release(version)
        follow.poll()
    store.release("v1")
    follow.poll()
    folders = {p.name.split("-")[0] for p in (tmp_path / "versions").iterdir() if p.is_dir()}
    assert folders == {str(store.numbers[v]) for v in ("v1", "v3")}


def test_a_version_that_passed_for_the_watcher_and_not_here_is_refused_once(store, toy, tmp_path, capfd):
    settings = replace(load_settings(toy), predictions=str(tmp_path))
    router = Router(settings, load_servable(store.root / "made/v1"))
    releases = watcher.Releases(champion=watcher.ModelVersion(9, str(store.root / "made/liar")))
    router.apply_releases(releases)
    assert (
        router.versions == {"champion": "v1"}
        and router.counts["refused"] == 1
        and "fails its self-test" in router.problem
    )
    router.apply_releases(watcher.Releases(champion=watcher.ModelVersion(2, str(store.root / "made/v2"))))
    assert router.versions == {"champion": "v2"} and router.problem is None
    assert capfd.readouterr().err.count("goes on answering") == 1


def test_nothing_to_serve_is_said(store, tmp_path):
    settings = store.settings(serve_from="models:/nothing", model_cache=str(tmp_path))
    with pytest.raises(
        ServingError, match="no version of 'nothing' can be served: model 'nothing' has no alias 'champion'"
    ):
        load_router(settings)
    with pytest.raises(BundleError):
        load_router(replace(settings, serve_from="bundle"), tmp_path)


def test_a_torn_releases_file_is_a_problem_not_an_end(tmp_path, store):
    settings = store.settings(model_cache=str(tmp_path))
    releases_folder(settings).mkdir(parents=True)
    (releases_folder(settings) / "releases.json").write_text('{"champion": {')
    releases = read_releases(releases_folder(settings))
    assert releases.champion is None and "cannot be read" in releases.problem
