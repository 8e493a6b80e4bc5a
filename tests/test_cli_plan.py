"""mlnb plan as a program: what goes to which stream, and that nothing is run."""

import json
import os

import pytest
import warm_cli
from pipeline_project import done, edit, make, notebook


@pytest.fixture
def project(tmp_path):
    return done(make(tmp_path / "project"))


def mlnb(root, *words):
    return warm_cli.run(words, cwd=root, env=os.environ)


def test_a_new_project(tmp_path):
    root = make(tmp_path / "project")
    shown = mlnb(root, "plan")
    assert shown.returncode == 0 and shown.stderr == ""
    assert shown.stdout.splitlines()[0].split() == ["●", "first", "outdated", "never", "ran"]
    assert shown.stdout.endswith("3 of 3 tasks would run\n") and not (root / "out").exists()


def test_json_is_alone_on_standard_output(project):
    edit(project / "planes" / "work.py", "FACTOR = 10", "FACTOR = 20")
    shown = mlnb(project, "plan", "--json")
    assert shown.returncode == 0 and shown.stderr == ""
    assert json.loads(shown.stdout) == {
        "tasks": [
            {"name": "first", "state": "outdated", "reasons": ["global planes.work.FACTOR changed"], "notes": []},
            {"name": "second", "state": "waiting", "reasons": ["upstream first will run"], "notes": []},
            {"name": "other", "state": "current", "reasons": [], "notes": []},
        ]
    }
    text = mlnb(project, "plan").stdout
    assert "1 of 3 tasks would run, 1 waits for what they write" in text and "global planes.work.FACTOR changed" in text


def test_nothing_to_do_from_anywhere_in_the_project(project):
    for folder in (project, project / "nbs"):
        shown = mlnb(folder, "plan")
        assert shown.returncode == 0 and shown.stdout.endswith("Nothing to do: 3 tasks are current\n")
    assert [t["name"] for t in json.loads(mlnb(project, "plan", "second", "--json").stdout)["tasks"]] == [
        "first",
        "second",
    ]
    assert [t["name"] for t in json.loads(mlnb(project, "plan", "--from", "second", "--json").stdout)["tasks"]] == [
        "second"
    ]
    assert [t["name"] for t in json.loads(mlnb(project, "plan", "--to", "other", "--json").stdout)["tasks"]] == [
        "other"
    ]


def test_a_parameter(project):
    shown = mlnb(project, "plan", "--param", "n=5")
    assert "parameter n changed from 1 to 5" in shown.stdout
    assert mlnb(project, "plan").stdout.endswith("Nothing to do: 3 tasks are current\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["othre"], "there is no task 'othre' (did you mean 'other'?)"),
        (["--to", "othre"], "there is no task 'othre' (did you mean 'other'?)"),
        (["--from", "second", "--to", "other"], "no task lies between second and other"),
        (["--param", "m=1"], "neither env.yaml nor any notebook declares a parameter 'm'"),
        (["--param", "n"], "is not of the form name=value"),
    ],
)
def test_mistakes(project, words, says):
    finished = mlnb(project, "plan", *words)
    assert (
        finished.returncode == 1
        and says in finished.stderr
        and finished.stdout == ""
        and "Traceback" not in finished.stderr
    )


def test_without_a_place_to_remember(tmp_path):
    root = make(tmp_path / "project")
    (root / ".mlnb").write_text("in the way")
    shown = mlnb(root, "plan")
    assert shown.returncode == 0 and "3 of 3 tasks would run" in shown.stdout
    assert "cannot be written" in shown.stderr and len(shown.stderr.splitlines()) == 1


def test_code_that_is_not_watched_is_named_with_its_tasks(tmp_path):
    root = make(tmp_path / "project")
    notebook(root / "nbs" / "other.ipynb", "upstream = None\nproduct = None", "%run scripts/s.py", "exec(text)")
    (root / "scripts").mkdir()
    (root / "scripts" / "s.py").write_text("x = 1\n")
    done(root)
    note = (
        "it runs code that is not tracked: exec of a text that is not literal; declare its files as inputs"
    )
    text = mlnb(root, "plan").stdout
    assert f"  note on other: {note}" in text and text.count("note on") == 1 and "Nothing to do" in text
    (root / "scripts" / "s.py").write_text("x = 2\n")
    assert "script scripts/s.py changed" in mlnb(root, "plan").stdout
    edit(root / "pipeline.yaml", "product: out/other.ipynb", "product: out/other.ipynb\n    inputs: [scripts/*.py]")
    text = mlnb(root, "plan").stdout
    assert "note on" not in text and "input scripts/s.py is new" in text
