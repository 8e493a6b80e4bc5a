import shutil
import signal
import socket
import subprocess

import pytest
import toy_project
from test_bento import MLNB, family, mlnb
from waiting import until


@pytest.fixture
def project(toy, tmp_path):
    return shutil.copytree(toy, tmp_path / "project")


def refused(done, *words):
    "The command ended with one sentence and no traceback"
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and done.stdout == ""
    for word in words:
        assert word in " ".join(done.stderr.split()), done.stderr


def test_a_port_in_use_is_named_before_anything_starts(project):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(
            mlnb(project, "serve", "--port", str(port)),
            f"port {port} of 127.0.0.1 cannot be used",
            "in use",
            "mlnb serve --port",
        )


@pytest.mark.parametrize(
    ("arguments", "says"), [((), "run: mlnb run, then mlnb build"), (("--development",), "make one with: mlnb run")]
)
def test_no_bundle(project, arguments, says):
    shutil.rmtree(project / "products")
    refused(mlnb(project, "serve", *arguments), says)
    refused(mlnb(project, "build"), "no model bundle in", "make one with: mlnb run")


def test_no_bento(project):
    refused(mlnb(project, "serve"), "no Bento has been built yet; run: mlnb build")


def no_bento(project):
    "Neither a server nor an image takes what is in the store"
    for command in ("serve", "containerize"):
        refused(mlnb(project, command), "no Bento has been built yet; run: mlnb build")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_bento_that_is_not_complete_is_none(project, tmp_path, number):
    "The service's packages are looked for in a process whose folder is the Bento's: there the build stands still"
    (tmp_path / "sitecustomize.py").write_text("import os, time\nif '/bentos/' in os.getcwd():\n    time.sleep(3600)\n")
    env = toy_project.environment(project) | {"PYTHONPATH": str(tmp_path)}
    bundle = ".mlnb/bentoml/bentos/*/*/src/bundle/bundle.json"
    building = subprocess.Popen(
        [*MLNB, "build"], cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(
            lambda: building.poll() is not None or (len(family(building.pid)) > 1 and list(project.glob(bundle))),
            "the Bento",
        )
        assert building.poll() is None
        no_bento(project)
    finally:
        everyone = family(building.pid)
        building.send_signal(number)
        building.wait()
        for one in everyone[1:]:
            if one.is_running():
                one.kill()
    no_bento(project)
    assert bool(list(project.glob(".mlnb/bentoml/bentos/*/*/src"))) == (number == signal.SIGKILL)


def test_a_lock_that_is_not_installed_leaves_no_bento(project):
    (project / "requirements.lock").write_text("numpy==0.0.1\n")
    refused(mlnb(project, "build"), "is installed, requirements.lock says 0.0.1")
    assert not list(project.glob(".mlnb/bentoml/bentos/*/*/src"))
    no_bento(project)


def test_no_bentofile(project):
    (project / "bentofile.yaml").unlink()
    refused(mlnb(project, "build"), "bentofile.yaml")


def test_a_bentofile_that_bentoml_refuses(project):
    (project / "bentofile.yaml").write_text("service: toy.nothing:Model\n")
    refused(mlnb(project, "build"), "BentoML cannot build", "toy.nothing")


def test_a_package_that_is_not_there(project):
    file = project / "pyproject.toml"
    file.write_text(file.read_text().replace('package = "toy"', 'package = "toys"'))
    refused(mlnb(project, "build"), "outside the trusted packages (toys)", "`package` in [tool.mlnb]")


def test_code_changed_since_training(project):
    source = project / "toy/features.py"
    source.write_text(source.read_text().replace("np.log1p", "np.sqrt"))
    for command in (("build",), ("serve", "--development")):
        refused(
            mlnb(project, *command), "trained with another toy.features.request_features", "train again with: mlnb run"
        )


def test_wrong_calls(project):
    refused(mlnb(project, "serve", "--bento", "toy:1", "--development"), "exclude each other")
    refused(mlnb(project, "serve", "--workers", "0"), "--workers")


@pytest.mark.parametrize("how", ["--no-bento", "--development"])
def test_a_setting_out_of_its_range_ends_the_server_before_it_starts(project, how):
    (project / "pyproject.toml").write_text((project / "pyproject.toml").read_text() + "challenger_percent = 150\n")
    refused(mlnb(project, "serve", how), "setting 'challenger_percent' has value 150", "a whole number from 0 to 100")


def test_outside_a_project(tmp_path):
    refused(mlnb(tmp_path, "serve"), "no project at or above")
