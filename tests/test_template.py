"""`mlnb new` from the checkout and from a wheel: the copy is a project of its own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest
import yaml
from uvicorn_process import run_server

from mlnb.project.errors import SettingError
from mlnb.project.template import COMMON_FILES, TEMPLATES, new_project, template_files, template_root

ROOT = Path(__file__).parents[1]


def run(*words, cwd, path=(), timeout=900):
    """A program of this environment in folder `cwd`, with `path` first among the imports."""
    kept = {"MLNB_TRACK_RUNS", "MLNB_RUNTIME_DIR"}
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MLNB_") or k in kept}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, path))
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source_copy(to: Path) -> Path:
    """The files of the checkout that git knows or would add, so that a build leaves nothing in the checkout."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


def text_files(project: Path):
    return [
        p
        for p in project.rglob("*")
        if p.is_file() and p.suffix in {".ipynb", ".py", ".toml", ".yaml", ".yml", ".md", ".lock"}
    ]


def test_the_copy_speaks_of_itself_alone(tmp_path):
    project = new_project("flight-delays", tmp_path, "flights")
    assert (project / "flight_delays" / "features.py").exists()
    assert (project / ".github" / "workflows" / "ci.yml").exists()
    for file in text_files(project):
        text = file.read_text()
        for foreign in ("mlnb.flights", "nbs/flights", "products/flights/", "PROJECT_NAME", "PROJECT_PACKAGE"):
            assert foreign not in text, f"{file} still says {foreign}"
    for notebook in (project / "nbs").glob("*.ipynb"):
        json.loads(notebook.read_text())
    assert "model_name: flight-delays #" in (project / "env.yaml").read_text()
    assert 'model_name = \\"flight-delays\\"' in (project / "nbs" / "06_register.ipynb").read_text()
    assert all(
        f"mlnb {word}" in (project / "README.md").read_text() for word in ("labels add", "performance", "alerts check")
    )


@pytest.mark.parametrize(
    "name", ["class", "json", "2fast", "Upper", "tests", "alerts", "dist", "build", "docs", "numpy", "a b", "../up"]
)
def test_a_name_that_will_not_do(name, tmp_path):
    with pytest.raises(SettingError, match="choose a new word"):
        new_project(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "delays").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("delays", "dangling"):
        with pytest.raises(SettingError, match="exists already"):
            new_project(name, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "delays"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def denied(**where):
        raise PermissionError(13, "Permission denied", where["dir"])

    monkeypatch.setattr("mlnb.project.template.mkdtemp", denied)
    with pytest.raises(SettingError, match=r"delays cannot be created in .* \(Permission denied\); change to a folder"):
        new_project("delays", tmp_path)


def test_the_workflow_runs_what_is_pinned_and_may_do_nothing_else(tmp_path):
    project = new_project("flight-delays", tmp_path, "flights")
    text = (project / ".github/workflows/ci.yml").read_text()
    workflow = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {"contents": "read"} and job["timeout-minutes"] > 0
    used = re.findall(r"uses: (\S+)", text)
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert job["steps"][0]["with"] == {"persist-credentials": False}
    install = (
        "pip install -r requirements.lock && pip install --no-deps vendor/mlnb-*.whl && pip install --no-deps -e ."
    )
    assert install in text and install in (project / "README.md").read_text()
    assert tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"] == []
    by_name = re.compile(r"pip install[^&\n]* mlnb(\s|$)|^mlnb\b", re.MULTILINE)
    assert not [file for file in text_files(project) if file.suffix != ".md" and by_name.search(file.read_text())]


@pytest.mark.parametrize(("test", "code", "said"), [
    (None, 2, "tests/ has no tests, so pytest has checked nothing"),
    ("def helper(): pass", 2, "tests/ has no tests, so pytest has checked nothing"),
    ("def test_it(): assert False", 2, "1 failed"),
    ("import no_such_module", 2, "1 error"),
    ("def test_it(): pass", 0, "1 passed"),
])  # fmt: skip
def test_make_test_is_green_only_for_what_was_tested(tmp_path, test, code, said):
    "The parts of `make test` that are tested elsewhere are replaced by programs that succeed"
    shutil.copy(ROOT / "template/common/Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\naddopts = "-q"\n')
    for folder in ("bin", "tests"):
        (tmp_path / folder).mkdir()
    for name in ("mlnb", "nbdev-test"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    if test:
        (tmp_path / "tests/test_it.py").write_text(test)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["make", "test"], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == code and said in done.stdout + done.stderr, done


LONG = pytest.mark.long
AVIATION = re.compile(r"flight|airport|airline|carrier|aviation|departure", re.IGNORECASE)


@pytest.mark.parametrize("template", ["minimal", pytest.param("text", marks=LONG), pytest.param("image", marks=LONG)])
def test_a_template_runs_answers_the_curl_of_its_readme_and_passes_its_tests(template, tmp_path):
    project = new_project("first-model", tmp_path, template)
    for file in text_files(project):
        assert file.name in COMMON_FILES or not AVIATION.search(file.read_text()), file
    report = json.loads(run("mlnb", "run", "--json", cwd=project / "tests"))
    assert {t["status"] for t in report["tasks"]} == {"executed"} and not any(t["notes"] for t in report["tasks"])
    run("mlnb", "check", cwd=project)
    assert "passed" in run(sys.executable, "-m", "pytest", cwd=project)
    curls = [shlex.split(line) for line in (project / "README.md").read_text().splitlines() if line.startswith("curl")]
    (body,) = (words[words.index("-d") + 1] for words in curls if words[1].endswith("/predict"))
    with run_server(project, tmp_path / "predictions") as (_, url):
        answer = httpx.post(f"{url}/predict", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 200 and answer.json()["request_id"], answer.text


def test_the_help_describes_every_template():
    text = run("mlnb", "new", "--help", cwd=ROOT)
    assert all(f"  {name} " in text and template.description in text for name, template in TEMPLATES.items())
    with pytest.raises(SettingError, match=r"there is no template 'flight' .did you mean 'flights'"):
        new_project("first-model", ROOT, "flight")


@pytest.mark.long
def test_a_wheel_makes_a_project_that_runs_and_passes_its_tests(tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    run(*pip, str(source_copy(tmp_path / "source")), cwd=tmp_path)
    site = tmp_path / "site"
    (wheel,) = tmp_path.glob("mlnb-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    carried = site / "mlnb" / "template"
    assert {str(p.relative_to(carried)) for p in carried.rglob("*") if p.is_file()} == set(
        template_files(template_root())
    )
    mlnb = [sys.executable, "-c", "from mlnb.cli.main import main; main()"]
    where = run(sys.executable, "-c", "import mlnb; print(mlnb.__file__)", cwd=tmp_path, path=[site])
    assert where.strip() == str(site / "mlnb" / "__init__.py")
    run(*mlnb, "new", "delays", "--template", "flights", cwd=tmp_path, path=[site])
    project = tmp_path / "delays"
    report = json.loads(run(*mlnb, "run", "--param", "epochs=2", "--json", cwd=project, path=[site]))
    assert report["status"] == "succeeded"
    assert {t["status"] for t in report["tasks"]} == {"executed"}
    run(*mlnb, "check", cwd=project, path=[site])
    run(sys.executable, "-m", "pytest", cwd=project, path=[site])
