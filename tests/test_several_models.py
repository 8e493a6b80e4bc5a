"""Several models in one repository: whose settings, folders, pipelines, runs and Bentos are whose."""

import json
import os
import shutil

import pytest
import toy_project
import warm_cli
from pipeline_project import edit, make, notebook

from mlnb.project.errors import SettingError
from mlnb.project.settings import load_settings

TABLES = """
storage = "data"
cost_positive = 2.0

[tool.mlnb.alerts.late]
kind = "runs"
hours = 26

[tool.mlnb.models.churn]
pipeline = "models/churn/pipeline.yaml"
port = 3001
[tool.mlnb.models.churn.env.production]
keys_required = true

[tool.mlnb.models.prices]
pipeline = "models/prices/pipeline.yaml"
bundle = "bundles/prices"
cost_positive = 1.5
[tool.mlnb.models.prices.alerts.late]
hours = 50

[tool.mlnb.env.production]
storage = "s3://bucket/ml"
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("MLNB_MODEL", "MLNB_ENV", "MLNB_STORAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path):
    root = make(tmp_path / "project")
    (root / "pipeline.yaml").unlink()
    with open(root / "pyproject.toml", "a") as file:
        file.write(TABLES)
    show = "from mlnb.project.settings import load_settings\nprint(load_settings().predictions)"
    for model in ("churn", "prices"):
        folder = root / "models" / model
        notebook(folder / "train.ipynb", "upstream = None\nproduct = None", show)
        (folder / "pipeline.yaml").write_text(f"tasks: [{{source: train.ipynb, product: ../../out/{model}.ipynb}}]\n")
    return root


def mlnb(root, *words, **variables):
    return warm_cli.run(words, cwd=root, env=os.environ | variables)


def test_settings(project, monkeypatch):
    churn, prices, general = (load_settings(project, model=model) for model in ("churn", "prices", None))
    assert (churn.name, churn.package, churn.port, churn.cost_positive) == ("churn", "planes", 3001, 2.0)
    assert (churn.storage, churn.predictions) == ("data/churn", ".mlnb/predictions/churn")
    assert (churn.labels, prices.labels) == (".mlnb/outcomes/churn", ".mlnb/outcomes/prices")
    assert (churn.bundle, prices.bundle, prices.cost_positive) == ("products/churn/bundle", "bundles/prices", 1.5)
    assert churn.alerts["late"]["hours"] == 26 and prices.alerts["late"] == {"kind": "runs", "hours": 50}
    assert (general.name, general.model, general.models, general.storage) == ("planes", "", ("churn", "prices"), "data")
    production = load_settings(project, "production", "churn")
    assert (production.storage, production.keys_required, production.port) == ("s3://bucket/ml/churn", True, 3001)
    monkeypatch.setenv("MLNB_MODEL", "prices")
    monkeypatch.setenv("MLNB_STORAGE", "/data/storage")
    assert (load_settings(project).name, load_settings(project).storage) == ("prices", "/data/storage")
    monkeypatch.setenv("MLNB_MODEL", "pricse")
    with pytest.raises(SettingError, match=r"no model 'pricse' \(did you mean 'prices'\?\).*: churn, prices"):
        load_settings(project)


def test_the_folder_of_a_pipeline_selects_its_model(project, monkeypatch):
    (project / "models" / "churn" / "deep").mkdir()
    assert load_settings(project / "models" / "churn" / "deep").model == "churn"
    assert load_settings(project / "models").model == ""
    monkeypatch.setenv("MLNB_MODEL", "prices")
    assert load_settings(project / "models" / "churn").model == "prices"


def test_the_only_model_is_selected(project):
    file = project / "pyproject.toml"
    file.write_text(file.read_text().partition("[tool.mlnb.models.prices]")[0])
    assert load_settings(project).model == "churn"


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ("[tool.mlnb.models]\nchurn = 1", "write a table for each: [tool.mlnb.models.NAME]"),
        ("[tool.mlnb.models.a]\nprot = 1", "[tool.mlnb.models.a]: unknown setting 'prot' (did you mean 'port'?)"),
        ('[tool.mlnb.models.a]\nport = "x"', "[tool.mlnb.models.a]: setting 'port' has value 'x'"),
        ('[tool.mlnb.models."a/b"]', "the model 'a/b' has an invalid name"),
        (
            '[tool.mlnb.models.a]\nlabels = "l"\n[tool.mlnb.models.b]\nlabels = "l"',
            "models 'a' and 'b' both have labels = 'l'; write another folder for one of them",
        ),
    ],
)
def test_mistakes(tmp_path, tables, says):
    (tmp_path / "pyproject.toml").write_text(f"[tool.mlnb]\n{tables}\n")
    with pytest.raises(SettingError) as error:
        load_settings(tmp_path)
    assert says in str(error.value)


def test_runs(project):
    done = mlnb(project, "run")
    assert done.returncode == 2
    assert "this project has 2 models: churn, prices; choose one, for example: --model churn" in done.stderr
    for words in (["run", "--model", "churn"], ["--model", "prices", "run"]):
        done = mlnb(project, *words, "--json")
        assert done.returncode == 0, done.stderr
    for model in ("churn", "prices"):
        executed = json.loads((project / "out" / f"{model}.ipynb").read_text())
        assert executed["cells"][-1]["outputs"][0]["text"] == [f".mlnb/predictions/{model}\n"]
    assert "1 task is current" in mlnb(project, "plan", "--model", "churn").stdout  # prices' task has the same name
    listed = json.loads(mlnb(project, "runs", "--json").stdout)
    assert [run["pipeline"] for run in listed] == ["prices", "churn"]
    listed = json.loads(mlnb(project, "runs", "--json", MLNB_MODEL="churn").stdout)
    assert [run["pipeline"] for run in listed] == ["churn"]
    done = mlnb(project, "run", "models/churn/train.ipynb")
    assert "is task 'train' of models/churn/pipeline.yaml" in done.stderr and "1 task is current" in done.stdout
    notebook(project / "models" / "churn" / "train.ipynb", "upstream = None\nproduct = None", "1 / 0")
    assert mlnb(project, "run", "--model", "churn").returncode == 1
    done = mlnb(project, "run", "--resume", "last")
    assert done.returncode == 1 and "churn/train.ipynb, cell [3]: ZeroDivisionError" in done.stderr


def test_commands_say_which_models_there_are(project):
    for words in ("drift log", "predictions", "labels status", "alerts list", "build", "serve", "performance"):
        done = mlnb(project, *words.split())
        assert done.returncode == 2 and "this project has 2 models: churn, prices" in done.stderr, words
    done = mlnb(project, "serve", "chrun", "--no-bento")
    assert done.returncode == 2 and "no model 'chrun' (did you mean 'churn'?)" in done.stderr
    assert "Warning" not in done.stderr
    done = mlnb(project, "serve", "churn", "--no-bento")
    assert done.returncode == 1 and "products/churn/bundle" in done.stderr
    done = mlnb(project, "labels", "status", "--model", "churn")
    assert done.returncode == 0, done.stderr
    found = json.loads(mlnb(project, "doctor", "--json").stdout)["findings"]
    items = {f["item"]: f["detail"] for f in found}
    assert items["Models"] == "churn, prices; selected: none, each is checked"
    assert items["prices: Model bundle"] == "none yet"
    assert "models/churn" not in mlnb(project, "check").stdout
    edit(project / "models" / "prices" / "pipeline.yaml", "out/prices.ipynb", "out/churn.ipynb")
    assert "models/churn/pipeline.yaml and models/prices/pipeline.yaml both write" in mlnb(project, "check").stdout


@pytest.mark.long
def test_a_bento_is_of_one_model(tmp_path):
    root = toy_project.make_without_context(tmp_path / "two")
    for model in ("churn", "prices"):
        shutil.copytree(root / "products" / "bundle", root / "products" / model / "bundle")
    with open(root / "pyproject.toml", "a") as file:
        file.write("[tool.mlnb.models.churn]\nport = 3171\n[tool.mlnb.models.prices]\n")
    variables = {"PYTHONPATH": str(root), "BENTOML_HOME": str(tmp_path / "bentos")}
    tags = {}
    for model in ("churn", "prices"):
        done = mlnb(root, "build", "--model", model, "--json", **variables)
        assert done.returncode == 0, done.stderr
        tags[model] = json.loads(done.stdout)
    settings = load_settings(f"{tags['churn']['path']}/src")
    assert (settings.model, settings.port, settings.predictions) == ("churn", 3171, ".mlnb/predictions/churn")
    done = mlnb(root, "serve", "churn", "--bento", tags["prices"]["tag"], **variables)
    assert done.returncode == 1 and f"there is no Bento '{tags['prices']['tag']}'" in done.stderr
