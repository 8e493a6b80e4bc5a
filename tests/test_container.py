"""What needs no container engine; tests/container.py makes a real image."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import kubernetes_validate
import pytest
import toy_project
import yaml
from test_bento import MLNB, mlnb
from test_cli_serve import refused

from mlnb.project.errors import ServingError
from mlnb.serving.container import manifest
from mlnb.serving.pins import closure, pinned, requirements

# An engine that only writes down how it was called, and what it was to build
ENGINE = """#!/bin/sh
case "$1" in
  version|info) exit ;;
esac
printf '%s\\n' "$@" > "$RECORD/arguments"
cp -r . "$RECORD/context"
exit 0
"""


@pytest.fixture(scope="module")
def built(toy, tmp_path_factory):
    "A project with a Bento, made under the real lock"
    root = shutil.copytree(toy, tmp_path_factory.mktemp("built") / "project")
    shutil.copy(toy_project.REPOSITORY / "requirements.lock", root)
    done = mlnb(root, "build", "--json")
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.fixture
def engines(built, tmp_path):
    "Runs `mlnb containerize` where these programs are the only engines there are"

    def call(programs, *arguments, **variables):
        (tmp_path / "bin").mkdir()
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        for name in ("sh", "cp"):
            (tmp_path / "bin" / name).symlink_to(shutil.which(name))
        variables |= {"PATH": str(tmp_path / "bin"), "RECORD": str(tmp_path)}
        env = {k: v for k, v in toy_project.environment(built[0]).items() if k != "PYTHONPATH"} | variables
        return subprocess.run([*MLNB, "containerize", *arguments], cwd=built[0], env=env, capture_output=True, text=True)

    return call


def test_an_image_installs_what_the_service_imports_and_no_more(built):
    narrow = pinned((Path(built[1]["path"]) / "env/python/requirements.txt").read_text())
    lock = pinned((toy_project.REPOSITORY / "requirements.lock").read_text())
    assert {"bentoml", "msgspec", "numpy", "pyarrow", "safetensors", "uvicorn", "uvloop", "starlette"} <= narrow.keys()
    assert not {"torch", "mlflow", "jupyterlab", "papermill", "ploomber", "mlnb", "toy", "pip"} & narrow.keys()
    assert {name: lock[name] for name in narrow} == narrow and len(narrow) < len(lock) / 2


def test_a_service_starts_with_these_packages_alone(built):
    "A process that can import nothing but the pinned packages loads the Bento's code and passes the self-test"
    path = Path(built[1]["path"])
    names = sorted(pinned((path / "env/python/requirements.txt").read_text()))
    code = f"""
import sys
from itertools import pairwise
from importlib.metadata import packages_distributions
allowed = set({names!r})
class Refuse:
    def find_spec(self, name, path=None, target=None):
        owners = {{d.lower().replace("_", "-") for d in owner.get(name.partition(".")[0], ())}}
        if owners and not owners & allowed and not owners & {{"mlnb", "setuptools"}}:
            raise ImportError(f"{{name}} is of {{owners}}, which the image does not have")
owner = packages_distributions()
sys.meta_path.insert(0, Refuse())
import mlnb.serving.bento
from mlnb.project.settings import load_settings
from mlnb.serving.app import app_of
app_of(load_settings("."), "bundle")
"""
    done = toy_project.run(path / "src", "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_setting_adds_packages(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path / "project")
    done = subprocess.run([*MLNB, "build", "--json"], cwd=root, capture_output=True, text=True,
                          env=toy_project.environment(root) | {"MLNB_SERVING_PACKAGES": "joblib"})  # fmt: skip
    assert "joblib" in pinned((Path(json.loads(done.stdout)["path"]) / "env/python/requirements.txt").read_text())


def test_a_lock_that_is_not_installed_is_an_error():
    with pytest.raises(ServingError, match=f"msgspec {version('msgspec')} is installed, requirements.lock says 0.0.1"):
        requirements(["msgspec"], "msgspec == 0.0.1  # old\nnumpy\n", "toy")


def test_requirements_are_followed_with_their_extras():
    assert "httptools" in closure(["uvicorn[standard]"]) and "httptools" not in closure(["uvicorn"])
    assert "click" not in closure(["uvicorn"], without={"click"}) and closure(["no-such-package"]) == {}


def test_what_the_engine_is_told(engines, built, tmp_path):
    arguments = ("--build-arg", "PIP_INDEX_URL=https://pypi.example.com/simple", "--opt", "network=host")
    done = engines({"buildah": ENGINE}, "--base", "cuda", "--image", "team/toy:1", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) | {"bento": ""} == {
        "image": "team/toy:1", "bento": "", "base": "nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04", "engine": "buildah",
    }  # fmt: skip
    told = (tmp_path / "arguments").read_text().split("\n")
    pairs = set(pairwise(told))
    assert ("--tag", "team/toy:1") in pairs and ("--network", "host") in pairs
    assert ("--build-arg", "BASE_IMAGE=nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04") in pairs
    assert ("--build-arg", "PIP_INDEX_URL=https://pypi.example.com/simple") in pairs


def test_the_dockerfile(engines, tmp_path):
    assert engines({"podman": ENGINE}).returncode == 0
    lines = (tmp_path / "context/env/docker/Dockerfile").read_text().splitlines()
    steps = [line.split(" ", 1)[0] for line in lines if line[:1].isupper()]
    at = lambda start: next(i for i, line in enumerate(lines) if line.startswith(start))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert steps[:2] == ["ARG", "FROM"] and f"BASE_IMAGE=python:{python}-slim" in (tmp_path / "arguments").read_text()
    assert at("RUN pip install --no-cache-dir --no-deps -r env/python/requirements.txt") < at("COPY . ./")
    assert at("COPY . ./") < at("RUN chown -R root:root . && chmod -R a+rX .") < at("USER bentoml")
    assert at("HEALTHCHECK") > at("ENTRYPOINT") and not [line for line in lines if line.startswith("ENV PIP")]
    assert (tmp_path / "context/src/bundle/bundle.json").is_file() and (tmp_path / "context/src/toy/features.py").is_file()


def test_the_first_engine_that_works_is_taken(engines):
    broken = "#!/bin/sh\necho cannot connect to the daemon >&2\nexit 1\n"
    assert json.loads(engines({"docker": broken, "podman": ENGINE}, "--json").stdout)["engine"] == "podman"


def test_no_engine(engines):
    broken = "#!/bin/sh\necho cannot connect to the daemon >&2\nexit 1\n"
    refused(engines({"docker": broken}), "docker says: cannot connect to the daemon", "podman is not installed", "buildah is not installed")


def test_an_engine_that_fails(engines):
    failing = ENGINE.replace("exit 0\n", "echo no space left >&2; exit 3\n")
    refused(engines({"buildah": failing}, "--engine", "buildah"), "no space left", "buildah could not make an image of Bento toy")


def test_wrong_calls(engines, built, toy, tmp_path):
    refused(engines({}, "--engine", "dockr"), "there is no engine 'dockr' (did you mean 'docker'?)")
    refused(mlnb(built[0], "containerize", "--bento", "none"), f"there is no Bento 'none'; built are {built[1]['tag']}")
    refused(mlnb(built[0], "containerize", "--build-arg", "PIP"), "'PIP' is not of the form NAME=VALUE")
    refused(mlnb(built[0], "containerize", "--manifest", "--image", 'x"y'), "is no name of an image")
    refused(mlnb(toy, "containerize"), "no Bento has been built yet; run: mlnb build")


def test_a_bento_without_our_template(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path / "project")
    parts = (root / "bentofile.yaml").read_text().partition("docker:")
    (root / "bentofile.yaml").write_text(parts[0] + "python:" + parts[2].partition("python:")[2])
    assert mlnb(root, "build").returncode == 0
    refused(mlnb(root, "containerize"), "was built without Dockerfile.template")


@pytest.mark.parametrize("kubernetes", ["1.28", "1.37"])
def test_kubernetes_accepts_the_manifest(built, kubernetes):
    done = mlnb(built[0], "containerize", "--manifest", "--image", "registry.example.com/toy:1")
    documents = {d["kind"]: d for d in yaml.safe_load_all(done.stdout)}
    assert set(documents) == {"Service", "PersistentVolumeClaim", "Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    for document in documents.values():
        kubernetes_validate.validate(document, kubernetes, strict=True)
    pod = documents["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "registry.example.com/toy:1" and pod["spec"]["securityContext"]["runAsUser"] == 1034
    assert documents["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert documents["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == documents["Deployment"]["metadata"]["name"]


NAMES = {"flights": "flights", "Flight_delays.v2": "flight-delays-v2", "7up": "model-7up", "...": "model"}


@pytest.mark.parametrize(("model", "name"), NAMES.items())
def test_names_that_kubernetes_allows(model, name):
    assert {d["metadata"]["name"] for d in yaml.safe_load_all(manifest(model, "toy:1"))} == {name}
