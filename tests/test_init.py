"""`mlnb init` adds to a repository what mlnb needs, and nothing else; without nbdev every command works there."""

import os
import subprocess
import tomllib

import pytest
import warm_cli
import yaml
from pipeline_project import notebook

from mlnb.pipelines.repository import add_files, examine_repository, missing_files
from mlnb.project.errors import SettingError

PYPROJECT = b'# ours\r\n[project]\r\nname = "customer-churn"  # a comment\r\n\r\n[tool.black]\r\nline-length=99'


def mlnb(root, *words, code=0):
    env = {k: v for k, v in os.environ.items() if k != "MLNB_TRUSTED_PACKAGES"}
    done = warm_cli.run(words, cwd=root, env=env)
    assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def files_of(root):
    names = (p for p in root.rglob("*") if not {".git", ".mlnb", "__pycache__"} & set(p.parts))
    return {p.relative_to(root): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in names if not p.is_dir()}


@pytest.fixture
def repository(tmp_path):
    "A package in src/, two notebooks of which one has parameters, a pyproject.toml with Windows line ends, git"
    (tmp_path / "src/churn").mkdir(parents=True)
    (tmp_path / "src/churn/__init__.py").touch()
    (tmp_path / "src/churn/scale.py").write_text("FACTOR = 3\n\n\ndef scaled(n):\n    return n * FACTOR\n")
    (tmp_path / "pyproject.toml").write_bytes(PYPROJECT)
    (tmp_path / ".gitignore").write_text("*.pyc\n/products")
    notebook(tmp_path / "work/explore.ipynb", None, "1 + 1")
    text = "from churn.scale import scaled\nopen(product['data'], 'w').write(str(scaled(month)))"
    notebook(tmp_path / "work/report.ipynb", "upstream = None\nproduct = None\nmonth = 2", text)
    notebook(tmp_path / ".venv/lib/other.ipynb", None, "1")
    (tmp_path / ".venv/pyvenv.cfg").touch()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_what_is_missing_is_added_once_and_every_command_works(repository):
    before = files_of(repository)
    shown = mlnb(repository, "init", "--dry-run")
    assert files_of(repository) == before and "| package = " in shown
    shown = mlnb(repository, "init")
    for text in ("src/churn (src layout)", "2 in work, 1 with a parameters cell", ".venv, but mlnb runs in"):
        assert text in shown
    for text in ("delete pipeline.yaml", "delete the last 2 lines of .gitignore, from # mlnb", "from [tool.mlnb]"):
        assert text in shown
    after = files_of(repository)
    assert {str(p) for p in after.keys() - before.keys()} == {"pipeline.yaml"}
    assert all(after[path].startswith(content) for path, content in before.items())
    table = (repository / "pyproject.toml").read_bytes().removeprefix(PYPROJECT)
    assert table.startswith(b"\r\n\r\n[tool.mlnb]\r\n") and table.count(b"\n") == table.count(b"\r\n")
    assert tomllib.loads(table.decode())["tool"]["mlnb"]["notebooks"] == "work"
    assert (repository / ".gitignore").read_text().splitlines()[2:] == [
        "",
        "# mlnb: records and logs, results of runs",
        ".mlnb/",
    ]
    assert "Nothing to add" in mlnb(repository, "init") and files_of(repository) == after

    assert "1 of 1 tasks would run" in mlnb(repository, "plan")
    mlnb(repository, "run")
    assert (repository / "products/report-data").read_text() == "6"
    text = (repository / "src/churn/scale.py").read_text()
    (repository / "src/churn/scale.py").write_text(text.replace("3", "4"))
    assert "global churn.scale.FACTOR changed" in mlnb(repository, "plan")
    checked = mlnb(repository, "check")
    assert "not examined: modules" in checked and "the project does not use nbdev" in checked
    assert "● Package" not in mlnb(repository, "doctor")


def test_a_repository_of_notebooks_alone(tmp_path):
    notebook(tmp_path / "churn report.ipynb", None, "1 + 1")
    shown = mlnb(tmp_path, "init")
    assert "there is no Python package" in shown and "mlnb run 'churn report.ipynb'" in shown
    assert {str(p) for p in files_of(tmp_path)} == {"churn report.ipynb", "pipeline.yaml", "pyproject.toml"}
    assert "source: churn report.ipynb" in (tmp_path / "pipeline.yaml").read_text()
    assert "needs a list of tasks" in mlnb(tmp_path, "plan", code=1)
    mlnb(tmp_path, "check")
    mlnb(tmp_path, "doctor")


def test_notebooks_of_papermill_are_tasks_as_they_are(tmp_path):
    for name in ("a/report", "b/report", "c/no"):
        notebook(tmp_path / f"{name}.ipynb", "month = 2", "print(month)")
    mlnb(tmp_path, "init")
    tasks = yaml.safe_load((tmp_path / "pipeline.yaml").read_text())["tasks"]
    assert [t["name"] for t in tasks] == ["a-report", "b-report", "no"]
    assert "executed" in mlnb(tmp_path, "run", "no")
    assert (tmp_path / "products/no.ipynb").exists()


def test_what_others_own_stays(repository):
    (repository / "pipeline.yaml").write_text("stages: {train: {cmd: make}}\n")
    (repository / "products").mkdir()
    (repository / "products/catalogue.csv").write_text("1")
    before = files_of(repository)
    mlnb(repository, "init")
    after = files_of(repository)
    assert {str(p) for p in after.keys() - before.keys()} == {"mlnb-pipeline.yaml"}
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["mlnb"]
    assert settings["pipeline"] == "mlnb-pipeline.yaml" and settings["bundle"] == "mlnb-products/bundle"
    mlnb(repository, "run")
    assert "Nothing to add" in mlnb(repository, "init")


def link(root):
    (root / "ours.toml").write_text("")
    (root / "pyproject.toml").unlink()
    (root / "pyproject.toml").symlink_to("ours.toml")


def second_package(root):
    (root / "src/tools").mkdir()
    (root / "src/tools/__init__.py").touch()


def impossible_package(root):
    (root / "src/churn").rename(root / "src/customer-churn")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: (root / "pyproject.toml").write_text("[tool"), "pyproject.toml is not valid TOML"),
        (lambda root: (root / "pyproject.toml").write_bytes(b"a = '\xff'"), "pyproject.toml is not valid TOML"),
        (lambda root: (root / "pyproject.toml").write_text("tool = {black = {}}"), "no table can be added to"),
        (lambda root: (root / "pyproject.toml").write_text("tool = 3"), "has tool = 3; it has to be a table"),
        (link, "is a link to ours.toml; mlnb does not write through links"),
        (lambda root: (root / "pipeline.yaml").mkdir(), "pipeline.yaml is not a file"),
        (lambda root: (root / "pipeline.yaml").symlink_to("nowhere"), "pipeline.yaml is not a file; move it away"),
        (second_package, "src has 2 packages: churn, tools; name the one of this project: mlnb init --package churn"),
        (impossible_package, "'customer-churn' cannot be imported under that name; rename its folder to"),
        (lambda root: (root.parent / "pyproject.toml").write_text("[tool.mlnb]"), "is inside the project"),
    ],
)
def test_one_sentence_and_nothing_added(repository, tmp_path_factory, change, says):
    root = repository.rename(tmp_path_factory.mktemp("outer") / "repository")
    change(root)
    before = files_of(root)
    shown = mlnb(root, "init", code=2)
    assert says in shown and shown.startswith("Error: ") and len(shown.splitlines()) == 1, shown
    assert files_of(root) == before


def test_a_package_is_chosen(repository):
    second_package(repository)
    mlnb(repository, "init", "--package", "tools")
    assert tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["mlnb"]["package"] == "tools"
    assert "write package" in mlnb(repository, "init", "--package", "churn", code=2)


def test_all_or_nothing(repository, monkeypatch):
    "A disk that is full at the last file"
    additions = missing_files(examine_repository(repository))
    additions[-1].path.chmod(0o444)
    before = files_of(repository)

    def full(path, mode):
        if path == additions[-1].path:
            raise OSError(28, "No space left on device", str(path))
        return open(path, mode)

    monkeypatch.setattr("mlnb.pipelines.repository.open", full, raising=False)
    with pytest.raises(SettingError, match=r"pyproject.toml cannot be written \(No space left on device\); nothing"):
        add_files(additions)
    assert files_of(repository) == before


def test_an_executed_copy_is_no_task(repository):
    notebook(repository / "work/report.ipynb", "month = 2", "month")
    mlnb(repository, "run", "work/report.ipynb", "-p", "month=7", "-o", "work/july.ipynb")
    found = examine_repository(repository)
    assert len(found.notebooks) == 3 and [str(path) for path in found.task_notebooks] == ["work/report.ipynb"]
