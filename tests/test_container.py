"""What needs no container engine; tests/container.py makes a real image."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
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
from mlnb.serving.bento_requirements import add_hashes, parse_pins, resolve_versions, service_requirements
from mlnb.serving.container import kubernetes_manifest

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


def wheel(folder: Path, name: str, version: str, content: str = "", tag: str = "py3-none-any"):
    "A wheel with one module, made by hand"
    about = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{about}-{tag}.whl", "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{name.replace('-', '_')}.py"), content)
        archive.writestr(
            zipfile.ZipInfo(f"{about}.dist-info/METADATA"), f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            zipfile.ZipInfo(f"{about}.dist-info/WHEEL"), f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        )
        archive.writestr(zipfile.ZipInfo(f"{about}.dist-info/RECORD"), "")
    return folder / f"{about}-{tag}.whl"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def only(folder: Path) -> dict[str, str]:
    "Variables with which pip finds what lies in a folder, and nothing else"
    nothing = {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_CONSTRAINT": ""}
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)} | nothing


@pytest.fixture(scope="module")
def index(built, tmp_path_factory):
    "A folder with a wheel of each package that the image installs"
    folder = tmp_path_factory.mktemp("index")
    for name, stated in parse_pins((Path(built[1]["path"]) / "env/python/requirements.txt").read_text()).items():
        wheel(folder, name, stated)
    return folder


@pytest.fixture
def engines(built, index, tmp_path):
    "Runs `mlnb containerize` where these programs are the only engines there are"

    def call(programs, *arguments, **variables):
        (tmp_path / "bin").mkdir()
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        for name in ("sh", "cp"):
            (tmp_path / "bin" / name).symlink_to(shutil.which(name))
        variables |= {"PATH": str(tmp_path / "bin"), "RECORD": str(tmp_path)} | only(index)
        env = {k: v for k, v in toy_project.environment(built[0]).items() if k != "PYTHONPATH"} | variables
        return subprocess.run(
            [*MLNB, "containerize", *arguments], cwd=built[0], env=env, capture_output=True, text=True
        )

    return call


def test_an_image_installs_what_the_service_imports_and_no_more(built):
    narrow = parse_pins((Path(built[1]["path"]) / "env/python/requirements.txt").read_text())
    lock = parse_pins((toy_project.REPOSITORY / "requirements.lock").read_text())
    assert {"bentoml", "msgspec", "numpy", "pyarrow", "safetensors", "uvicorn", "uvloop", "starlette"} <= narrow.keys()
    assert not {"torch", "mlflow", "jupyterlab", "papermill", "ploomber", "mlnb", "toy", "pip"} & narrow.keys()
    assert {name: lock[name] for name in narrow} == narrow and len(narrow) < len(lock) / 2


def test_a_service_starts_with_these_packages_alone(built):
    "A process that can import nothing but the pinned packages loads the Bento's code and passes the self-test"
    path = Path(built[1]["path"])
    names = sorted(parse_pins((path / "env/python/requirements.txt").read_text()))
    code = f"""
import os, sys
from importlib.metadata import packages_distributions
for name in ("STORAGE", "PREDICTIONS", "OUTCOMES"):
    os.environ[f"MLNB_{{name}}"] = "/data"
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
from mlnb.serving.app import load_app
load_app(load_settings("."), "bundle")
"""
    done = toy_project.run(path / "src", "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_setting_adds_packages(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path / "project")
    done = subprocess.run([*MLNB, "build", "--json"], cwd=root, capture_output=True, text=True,
                          env=toy_project.environment(root) | {"MLNB_SERVING_PACKAGES": "joblib"})  # fmt: skip
    assert "joblib" in parse_pins((Path(json.loads(done.stdout)["path"]) / "env/python/requirements.txt").read_text())


def test_a_lock_that_is_not_installed_is_an_error():
    with pytest.raises(ServingError, match=f"msgspec {version('msgspec')} is installed, requirements.lock says 0.0.1"):
        service_requirements(["msgspec"], "msgspec == 0.0.1  # old\nnumpy\n", "toy")


def test_requirements_are_followed_with_their_extras():
    assert "httptools" in resolve_versions(["uvicorn[standard]"]) and "httptools" not in resolve_versions(["uvicorn"])
    assert (
        "click" not in resolve_versions(["uvicorn"], without={"click"}) and resolve_versions(["no-such-package"]) == {}
    )


def test_what_the_engine_is_told(engines, built, tmp_path):
    arguments = ("--build-arg", "PIP_INDEX_URL=https://pypi.example.com/simple", "--build-opt", "network=host")
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
    done = engines({"podman": ENGINE})
    assert (
        done.returncode == 0
        and "is a tag, which may be another image tomorrow; pin it with base_image or --base" in done.stderr
    )
    lines = (tmp_path / "context/env/docker/Dockerfile").read_text().splitlines()
    steps = [line.split(" ", 1)[0] for line in lines if line[:1].isupper()]
    at = lambda start: next(i for i, line in enumerate(lines) if line.startswith(start))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert steps[:2] == ["ARG", "FROM"] and f"BASE_IMAGE=python:{python}-slim" in (tmp_path / "arguments").read_text()
    assert at("RUN pip install --no-cache-dir --no-deps --require-hashes -r env/python/requirements.txt") < at(
        "COPY . ./"
    )
    assert at("COPY . ./") < at("RUN chown -R root:root . && chmod -R a+rX .") < at("USER bentoml")
    assert at("HEALTHCHECK") > at("ENTRYPOINT") and not [line for line in lines if line.startswith("ENV PIP")]
    assert (tmp_path / "context/src/bundle/bundle.json").is_file() and (
        tmp_path / "context/src/toy/features.py"
    ).is_file()


def test_an_image_installs_by_the_hashes_of_the_index(engines, index, tmp_path):
    digest = "python:3.11-slim@sha256:" + "0" * 64
    done = engines({"podman": ENGINE}, "--base", digest, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["base"] == digest and "is a tag" not in done.stderr
    head, *lines = (tmp_path / "context/env/python/requirements.txt").read_text().splitlines()
    assert head.startswith("# hashes of what pip found") and len(lines) > 20
    (numpy,) = [line for line in lines if line.startswith("numpy==")]
    assert numpy == f"numpy=={version('numpy')} --hash=sha256:{sha256(next(index.glob('numpy-*.whl')))}"
    assert all(" --hash=sha256:" in line for line in lines)


@pytest.mark.parametrize("base", ["python@sha256:abc", "python:3.11-slim@md5:" + "0" * 32, "@sha256:" + "0" * 64])
def test_a_digest_that_is_none(engines, base):
    refused(
        engines({"podman": ENGINE}, "--base", base),
        "has no valid digest; write IMAGE@sha256: and 64 hexadecimal digits",
    )


def test_hashes_are_those_of_the_index_in_use(tmp_path, monkeypatch):
    "Another index serves another file of the same name and version; a local build such as +cpu is what pip takes"
    files = {}
    for name in ("one", "two"):
        (folder := tmp_path / name).mkdir()
        files[name] = [wheel(folder, "pack", "1.0", content=name), wheel(folder, "torch", "2.0+cpu", content=name)]
        text = add_hashes("pack==1.0\ntorch==2.0\n", ["3.11"], "x86_64", only(folder))
        pack, torch = map(sha256, files[name])
        assert text.splitlines()[1:] == [f"pack==1.0 --hash=sha256:{pack}", f"torch==2.0 --hash=sha256:{torch}"]
    assert add_hashes(text, ["3.11"], "x86_64", only(folder)) == text  # nothing is asked again
    other = add_hashes(text, ["3.11"], "x86_64", only(tmp_path / "one"))
    assert sha256(files["one"][0]) in other and sha256(files["two"][0]) not in other
    file = tmp_path / "requirements.txt"
    file.write_text(other)
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--require-hashes",
        "--target",
        tmp_path / "site",
        "-r",
        file,
    ]
    right, wrong = (
        subprocess.run(install, env=os.environ | only(tmp_path / n), capture_output=True, text=True)
        for n in ("one", "two")
    )
    assert right.returncode == 0, right.stderr
    assert wrong.returncode != 0 and "DO NOT MATCH THE HASHES" in wrong.stderr


def test_hashes_of_the_image_and_not_of_this_machine(tmp_path):
    for system in (
        "311-manylinux_2_28_aarch64",
        "311-manylinux_2_28_x86_64",
        "312-manylinux2014_x86_64",
        "311-macosx_11_0_arm64",
    ):
        wheel(tmp_path, "pack", "1.0", content=system, tag=f"cp{system[:3]}-cp{system}")
    of = lambda tag: sha256(next(tmp_path.glob(f"*{tag}.whl")))
    found = lambda pythons, architecture: set(
        re.findall("[0-9a-f]{64}", add_hashes("pack==1.0", pythons, architecture, only(tmp_path)))
    )
    assert found(["3.11"], "arm64") == {of("28_aarch64")} and found(["3.12"], "amd64") == {of("2014_x86_64")}
    assert found(["3.11", "3.12"], "x86_64") == {of("28_x86_64"), of("2014_x86_64")}
    assert found(["3.12", "3.11"], "aarch64") == {of("28_aarch64")}  # there is none for 3.12
    with pytest.raises(
        ServingError, match=r"pip does not find the packages of the image, for Python 3.12 on aarch64: .*pack==1.0"
    ):
        found(["3.12"], "aarch64")


def test_the_first_engine_that_works_is_taken(engines):
    broken = "#!/bin/sh\necho cannot connect to the daemon >&2\nexit 1\n"
    assert json.loads(engines({"docker": broken, "podman": ENGINE}, "--json").stdout)["engine"] == "podman"


def test_no_engine(engines):
    broken = "#!/bin/sh\necho cannot connect to the daemon >&2\nexit 1\n"
    refused(
        engines({"docker": broken}),
        "docker says: cannot connect to the daemon",
        "podman is not installed",
        "buildah is not installed",
    )


def test_an_engine_that_fails(engines):
    failing = ENGINE.replace("exit 0\n", "echo no space left >&2; exit 3\n")
    refused(
        engines({"buildah": failing}, "--engine", "buildah"),
        "no space left",
        "buildah could not build an image of Bento toy",
    )


def test_wrong_calls(engines, built, toy, tmp_path):
    refused(engines({}, "--engine", "dockr"), "there is no engine 'dockr' (did you mean 'docker'?)")
    refused(mlnb(built[0], "containerize", "--bento", "none"), f"there is no Bento 'none'; built are {built[1]['tag']}")
    refused(mlnb(built[0], "containerize", "--build-arg", "PIP"), "'PIP' does not have the form NAME=VALUE")
    refused(mlnb(built[0], "containerize", "--kubernetes-manifest", "--image", 'x"y'), "is not a valid image name")
    refused(mlnb(toy, "containerize"), "no Bento has been built yet; run: mlnb build")


@pytest.mark.long
def test_a_bento_without_our_template(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path / "project")
    parts = (root / "bentofile.yaml").read_text().partition("docker:")
    (root / "bentofile.yaml").write_text(parts[0] + "python:" + parts[2].partition("python:")[2])
    assert mlnb(root, "build").returncode == 0
    refused(mlnb(root, "containerize"), "was built without Dockerfile.template")


@pytest.mark.parametrize("kubernetes", ["1.28", "1.37"])
def test_kubernetes_accepts_the_manifest(built, kubernetes):
    done = mlnb(built[0], "containerize", "--kubernetes-manifest", "--image", "registry.example.com/toy:1")
    documents = {d["kind"]: d for d in yaml.safe_load_all(done.stdout)}
    assert set(documents) == {
        "Service",
        "PersistentVolumeClaim",
        "Deployment",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
    }
    for document in documents.values():
        kubernetes_validate.validate(document, kubernetes, strict=True)
    pod = documents["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "registry.example.com/toy:1" and pod["spec"]["securityContext"]["runAsUser"] == 1034
    assert documents["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert (
        documents["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == documents["Deployment"]["metadata"]["name"]
    )


NAMES = {"flights": "flights", "Flight_delays.v2": "flight-delays-v2", "7up": "model-7up", "...": "model"}


@pytest.mark.parametrize(("model", "name"), NAMES.items())
def test_names_that_kubernetes_allows(model, name):
    assert {d["metadata"]["name"] for d in yaml.safe_load_all(kubernetes_manifest(model, "toy:1"))} == {name}
