"""Every command and example of docs/your-own-model.md is run as it stands there."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import toy_project
import uvicorn_process
import warm_cli

from mlnb.models.bundle import Bundle
from mlnb.project.settings import load_settings

PAGE = (Path(__file__).parents[1] / "docs/your-own-model.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


SHELL = [block.splitlines() for block in blocks("sh")]


def follow(lines: list[str], folder: Path) -> Path:
    "Run the lines of a block, and return the folder that they end in; a service is asked whether it is ready"
    for line in lines:
        command, *words = shlex.split(line)
        if command == "cd":
            folder = folder / words[0]
        elif words[0] == "serve":
            with uvicorn_process.run_server(folder, folder / ".mlnb/predictions", *words[2:]) as (_, url):
                answer = toy_project.post(f"{url}/predict", json=toy_project.example(folder))
                assert answer.status_code == 200, answer.text
        else:
            done = warm_cli.run(words, cwd=folder, env=toy_project.environment(folder))
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return folder


def test_a_fitted_model(tmp_path, monkeypatch):
    pytest.importorskip("lightgbm")
    (tmp_path / "pyproject.toml").write_text('[tool.mlnb]\npackage = "shop"\n')
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"area": rng.uniform(30, 200, 300), "rooms": rng.integers(1, 7, 300).astype(float)})
    table["price"] = 2000 * table["area"] + rng.normal(0, 1000, 300)
    (example,) = blocks("python")
    exec(compile(example, "your-own-model.md", "exec"), {"table": table})
    bundle = Bundle.load(tmp_path / "products/bundle")
    assert bundle.self_test() == 20 and bundle.problem.unit == "EUR" and bundle.reference


def test_several_models(tmp_path):
    (example,) = blocks("toml")
    (tmp_path / "pyproject.toml").write_text(f'[tool.mlnb]\npackage = "shop"\n\n{example}')
    for name in ("churn", "prices"):
        settings = load_settings(tmp_path, model=name)
        assert settings.model == name and name in str(settings.path(settings.predictions))


@pytest.fixture
def start(tmp_path):
    "A folder with a table and a repository"
    rng = np.random.default_rng(0)
    usage = rng.poisson(20, 2000)
    pd.DataFrame(
        {
            "customer_id": [f"C-{i % 700}" for i in range(2000)],
            "signed_up": pd.Timestamp("2025-01-01") + pd.to_timedelta(np.arange(2000) * 4, unit="h"),
            "usage": usage,
            "plan": rng.choice(["free", "pro"], 2000),
            "churned": rng.random(2000) < 1 / (1 + np.exp(usage / 4 - 4)),
        }
    ).to_parquet(tmp_path / "customers.parquet")
    repository = tmp_path / "my-repository"
    (repository / "notebooks").mkdir(parents=True)
    (repository / "shop.py").write_text("RATE = 2\n")
    (repository / "pyproject.toml").write_text('[project]\nname = "shop"\nversion = "0"\n')
    from pipeline_project import notebook

    notebook(repository / "notebooks/report.ipynb", "month = 1", "assert month == 3")
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize("block", SHELL, ids=lambda block: block[0])
def test_every_start(start, block):
    follow(block, start)


def test_the_page_has_these_starts():
    assert [block[0].split(" ")[0:2] for block in SHELL] == [["mlnb", "new"], ["mlnb", "new"], ["cd", "my-repository"]]
