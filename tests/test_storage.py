"""A storage that cannot be opened: a library is missing, or nobody knows such a place."""

import shutil

import pandas as pd
import pytest
import toy_project
import warm_cli
from waiting import free_port

from mlnb.project.errors import SettingError
from mlnb.project.settings import load_settings
from mlnb.serving.app import load_app


@pytest.fixture(scope="module")
def project(toy, tmp_path_factory):
    root = shutil.copytree(toy, tmp_path_factory.mktemp("storage") / "toy")
    pd.DataFrame({"entity": ["a"], "value": [0]}).to_parquet(root / "outcomes.parquet")
    return root


COMMANDS = [
    "drift log",
    "predictions",
    "performance",
    "compact",
    "labels add outcomes.parquet",
    "serve --no-bento",
    "serve --development",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_the_setting_and_what_to_do(project, command):
    words = [*command.split(), *(["--port", str(free_port())] if "serve" in command else [])]
    environment = toy_project.environment(project) | {"MLNB_STORAGE": "foo://nope/x"}
    done = warm_cli.run(words, cwd=project, env=environment)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "Traceback" not in said, said
    assert (
        "setting 'storage': foo://nope/x" in said and "Protocol not known: foo" in said and "s3://bucket/folder" in said
    )


def test_a_missing_library_is_named_and_no_worker_starts(project, monkeypatch):
    from fsspec.registry import known_implementations

    lost = {"class": "nosuchlibrary.Files", "err": "Install nosuchlibrary to access this"}
    monkeypatch.setitem(known_implementations, "lost", lost)
    monkeypatch.setenv("MLNB_STORAGE", "lost://nope/x")
    with pytest.raises(
        SettingError, match="setting 'storage': lost://nope/x cannot be opened: Install nosuchlibrary to access this"
    ):
        load_app(load_settings(project))
