"""What would run and why, on a project whose tasks are made by hand: no kernel is needed to plan."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from pipeline_project import done, edit, finish, make, notebook, planner

from mlnb.pipelines import plan as module
from mlnb.pipelines.plan_cache import cached_plan
from mlnb.project.errors import PipelineError
from mlnb.project.settings import load_settings

ALL = ["first", "second", "other"]
CURRENT = dict.fromkeys(ALL, "current")


def states(root, *assignments):
    return {s.name: s.state for s in planner(root, *assignments).plan()}


def reasons(root, *assignments):
    return {s.name: list(s.reasons) for s in planner(root, *assignments).plan() if s.reasons}


def known(root, *assignments, **ends):
    found = cached_plan(load_settings(root), assignments, **ends)
    return found and [s.name for s in found]


@pytest.fixture
def project(tmp_path):
    return done(make(tmp_path / "project"))


def test_a_new_project_runs_whole(tmp_path):
    root = make(tmp_path / "project")
    assert states(root) == {"first": "outdated", "second": "outdated", "other": "outdated"}
    assert reasons(root) == {"first": ["never ran"], "second": ["never ran"], "other": ["never ran"]}
    assert known(root) is None and not (root / ".mlnb").exists()


def test_nothing_to_do(project):
    assert states(project) == CURRENT
    assert (
        known(project) == ALL
        and known(project, to=["second"]) == ["first", "second"]
        and known(project, only=["other"]) == ["other"]
    )
    with pytest.raises(PipelineError, match=r"there is no task 'othre' \(did you mean 'other'\?\)"):
        known(project, only=["othre"])


def test_what_changes_nothing(project):
    edit(project / "planes" / "work.py", "    return n * FACTOR", "    # by a factor\n    return n * FACTOR")
    edit(project / "planes" / "work.py", "return n\n", "return -n\n")  # another function
    edit(project / "nbs" / "first.ipynb", "write_text(str(scaled(n)))", "write_text( str(scaled(n)) )  # text")
    edit(
        project / "nbs" / "second.ipynb",
        '"outputs": []',
        '"outputs": [{"output_type": "stream", "name": "stdout", "text": "3"}]',
    )
    os.utime(project / "out" / "data.txt")
    (project / "planes" / "more.py").write_text("x = 1")
    assert states(project) == CURRENT


def work(old, new):
    return lambda root: edit(root / "planes" / "work.py", old, new)


def replaced(name, text):
    return lambda root: (root / "out" / name).write_text(text)


CHANGES = {
    "function": (work("return n * FACTOR", "return n + FACTOR"), {"first": ["function planes.work.scaled changed"]}),
    "global": (work("FACTOR = 10", "FACTOR = 20"), {"first": ["global planes.work.FACTOR changed"]}),
    "notebook": (
        lambda root: edit(root / "nbs" / "other.ipynb", "1 + 1", "1 + 2"),
        {"other": ["its notebook changed"]},
    ),
    "parameter": (
        lambda root: (root / "env.yaml").write_text("n: 2\n"),
        {"first": ["parameter n changed from 1 to 2"]},
    ),
    "form": (lambda root: edit(root / "pipeline.yaml", '"{{n}}"', "1"), {}),
    "default": (
        lambda root: edit(root / "pipeline.yaml", '    params: {n: "{{n}}"}\n', ""),
        {"first": ["parameter n is not given any more"]},
    ),
    "garbage": (replaced("data.txt", "99"), {"first": ["data.txt was modified after the run"]}),
    "garbage inside": (replaced("folder/part", "x"), {"first": ["folder was modified after the run"]}),
    "one more file": (replaced("folder/more", ""), {"first": ["folder was modified after the run"]}),
    "deleted": (lambda root: (root / "out" / "sum.txt").unlink(), {"second": ["sum.txt does not exist"]}),
    "folder deleted": (lambda root: shutil.rmtree(root / "out" / "folder"), {"first": ["folder does not exist"]}),
    "moved": (
        lambda root: edit(root / "pipeline.yaml", "data: out/sum.txt", "data: out/total.txt"),
        {"second": ["product data is now out/total.txt, it was out/sum.txt"]},
    ),
    "undeclared": (
        lambda root: edit(root / "pipeline.yaml", ", folder: out/folder", ""),
        {"first": ["product folder is not declared any more"]},
    ),
    "record deleted": (lambda root: (root / ".mlnb/tasks/pipeline/other.json").unlink(), {"other": ["never ran"]}),
    "two at once": (
        lambda root: [work("FACTOR = 10", "FACTOR = 20")(root), (root / "out" / "data.txt").unlink()],
        {"first": ["global planes.work.FACTOR changed", "data.txt does not exist"]},
    ),
}


@pytest.mark.parametrize(("change", "why"), CHANGES.values(), ids=CHANGES)
def test_what_changed_is_named(project, change, why):
    change(project)
    if "first" in why:
        why = why | {"second": ["upstream first will run"]}
    assert known(project) is None
    assert reasons(project) == why
    assert states(project) == {
        n: "current" if n not in why else "waiting" if "upstream" in why[n][0] else "outdated" for n in ALL
    }


def test_an_equal_result_stops_there(project):
    work("return n * FACTOR", "return FACTOR * n")(project)
    plan = planner(project)
    assert plan.decide("first").reasons == ("function planes.work.scaled changed",)
    finish(plan, "first")  # writes the same
    assert plan.decide("second").state == "current"
    plan.save()
    assert known(project) == ALL
    finish(plan, "first", text="2")
    assert plan.decide("second").reasons == ("output of first changed",)


def test_an_executed_notebook_counts_where_it_is_alone(project):
    notebook(project / "nbs" / "second.ipynb", 'upstream = ["first", "other"]\nproduct = None\nextra = 1', "1")
    finish(planner(project), "second")
    (project / "out" / "first.ipynb").write_text("again")
    assert planner(project).decide("second").state == "current"
    (project / "out" / "other.ipynb").write_text("again")
    assert planner(project).decide("second").reasons == ("output of other changed",)
    (project / "out" / "other.ipynb").unlink()
    assert planner(project).decide("second").reasons == ("output of other does not exist (nb)",)


def test_an_edit_while_the_task_runs_is_seen_by_the_next_plan(project):
    plan = planner(project)
    start_fingerprint = plan.begin("first")
    work("FACTOR = 10", "FACTOR = 20")(project)
    plan.commit("first", start_fingerprint, "run-2", 1.0)
    assert reasons(project)["first"] == ["global planes.work.FACTOR changed"]


def test_a_notebook_edited_after_the_pipeline_was_read(project):
    "The end of a run must not vouch for a pipeline that it has not seen"
    plan = planner(project)
    notebook(project / "nbs" / "other.ipynb", 'upstream = ["second"]\nproduct = None', "1 + 1")
    finish(plan, "other")
    plan.save()
    assert known(project) is None
    assert reasons(project)["other"] == ["upstream second is new"]


def test_parameters_from_the_command_line(project):
    assert reasons(project, "n=3") == {
        "first": ["parameter n changed from 1 to 3"],
        "second": ["upstream first will run"],
    }
    assert reasons(project, "extra=2") == {"second": ["parameter extra changed from 1 to 2"]}
    plan = planner(project, "extra=2")
    finish(plan, "second")
    plan.save()
    assert known(project, "extra=2") == ALL and known(project) is None and known(project, "extra=3") is None
    assert reasons(project) == {"second": ["parameter extra changed from 2 to its default 1"]}


def test_variables_and_environments_have_their_own_plan(project, monkeypatch):
    assert known(project) == ALL
    monkeypatch.setenv("MLNB_STORAGE", "elsewhere")
    assert known(project) is None
    monkeypatch.delenv("MLNB_STORAGE")
    with (project / "pyproject.toml").open("a") as f:
        f.write('[tool.mlnb.env.prod]\nstorage = "s3://x"\n')
    assert known(project) == ALL
    monkeypatch.setenv("MLNB_ENV", "prod")
    assert known(project) is None


def with_inputs(root):
    edit(
        root / "pipeline.yaml",
        "    product: out/other.ipynb",
        "    product: out/other.ipynb\n    inputs: [data/*.csv, limits.json, raw]",
    )
    (root / "data").mkdir()
    (root / "raw").mkdir()
    (root / "data" / "a.csv").write_text("1")
    return root


def test_declared_inputs(tmp_path):
    root = done(with_inputs(make(tmp_path / "project")))
    assert [s.notes for s in planner(root).plan(["other"])] == [("input limits.json does not exist",)]
    assert cached_plan(load_settings(root), only=["other"])[0].notes == ("input limits.json does not exist",)
    for change, why in (
        (lambda: (root / "data" / "a.csv").write_text("2"), "input data/a.csv changed"),
        (lambda: (root / "data" / "b.csv").touch(), "input data/b.csv is new"),
        (lambda: (root / "data" / "a.csv").unlink(), "input data/a.csv does not exist any more"),
        (lambda: (root / "limits.json").touch(), "input limits.json is new"),
        (lambda: (root / "raw" / "x").touch(), "input raw changed"),
    ):
        change()
        assert known(root) is None and reasons(root) == {"other": [why]}
        finish(plan := planner(root), "other")
        plan.save()
    (root / "data" / "b.csv").unlink()
    assert planner(root).plan(["other"])[0].notes == ("input data/*.csv matches nothing",)


def test_versions_of_packages(project, monkeypatch):
    edit(project / "nbs" / "other.ipynb", "1 + 1", "import numpy, json, mlnb")
    finish(planner(project), "other")
    record = json.loads((project / ".mlnb/tasks/pipeline/other.json").read_text())["record"]
    assert list(record["made_from"]["packages"]) == ["mlnb", "numpy"]
    before = record["made_from"]["packages"]["numpy"]
    monkeypatch.setattr("mlnb.pipelines.packages.installed_distributions", lambda _: {"numpy": ("99.1", "")})
    monkeypatch.setattr("mlnb.pipelines.packages.site_packages", lambda: [str(project)])
    assert reasons(project) == {"other": [f"numpy {before} is now 99.1"]}
    assert known(project) is None


def test_some_tasks_and_force(project):
    work("FACTOR = 10", "FACTOR = 20")(project)
    plan = planner(project)
    assert [s.name for s in plan.plan(["second"])] == ["first", "second"]
    assert [(s.name, s.state) for s in plan.plan(from_="second")] == [
        ("second", "current")
    ]  # what it needs is taken as it lies
    forced = {s.name: s.reasons[:1] for s in plan.plan(["second"], force=True)}
    assert forced == {"first": ("global planes.work.FACTOR changed",), "second": ("it was forced",)}
    assert all("it was forced" in s.reasons for s in plan.plan(force=True))
    assert [s.state for s in plan.plan(from_="first", force=True)] == ["outdated", "outdated"]


def test_how_long_it_took(project):
    assert planner(project).last("first")["seconds"] == 1.5 and planner(project).last("first")["run"] == "run-1"


def test_a_moved_project(project, tmp_path):
    subprocess.run(["cp", "-a", project, tmp_path / "moved"], check=True)
    assert states(tmp_path / "moved") == CURRENT
    shutil.rmtree(project)
    assert states(tmp_path / "moved") == CURRENT


def test_a_module_that_is_found_by_a_beginning(project):
    (project / "planes" / "plugins").mkdir()
    (project / "planes" / "plugins" / "a.py").write_text("x = 1")
    cell = "import importlib\nimportlib.import_module(f'planes.plugins.{n}')"
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", cell)
    done(project)
    assert known(project) == ALL
    (project / "planes" / "plugins" / "b.py").write_text("x = 2")
    assert known(project) is None
    assert reasons(project) == {"other": ["module planes.plugins.b is used now"]}


# Faults


DAMAGES = [lambda t: t[:-20], lambda t: "", lambda t: "[]", lambda t: t.replace("other", "first"), lambda t: "\0\xff"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_runs_again(project, damage):
    path = project / ".mlnb/tasks/pipeline/other.json"
    path.write_text(damage(path.read_text()), encoding="latin-1")
    assert reasons(project) == {"other": ["its record is damaged"]}
    finish(planner(project), "other")
    assert states(project) == CURRENT


@pytest.mark.parametrize("name", ["@manifest", "@memory.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\0", b'{"key": 1}', b'{"format": 1, "parts": {"sources": {"x": 3}}}']
)
def test_a_damaged_manifest_is_made_anew(project, name, content):
    path = project / ".mlnb/tasks/pipeline" / name
    path.write_bytes(content)
    plan = planner(project)
    assert {s.name: s.state for s in plan.plan()} == CURRENT
    plan.save()
    assert known(project) == ALL


def test_half_a_manifest(project):
    path = project / ".mlnb/tasks/pipeline/@manifest"
    whole = path.read_bytes()
    assert known(project) == ALL
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole.replace(b"second", b"sekond", 1),
        whole[1:],
        whole + b" ",
    ):
        path.write_bytes(damaged)
        assert known(project) is None


def test_everything_is_forgotten(project):
    shutil.rmtree(project / ".mlnb")
    assert set(states(project).values()) == {"outdated"}


def test_a_kill_between_two_products(project):
    plan = planner(project)
    plan.begin("first")
    plan.forget("first")
    (project / "out" / "data.txt").write_text("half")
    assert planner(project).decide("first").reasons == ("never ran",)


def test_the_clock_was_put_back(project):
    "A file from the future is read again each time, so no change in it can be missed"
    data = project / "out" / "data.txt"
    os.utime(data, (4e9, 4e9))
    assert states(project) == CURRENT and known(project) is None
    plan = planner(project)
    plan.save()
    assert known(project) is None
    before = os.stat(data)
    with data.open("r+") as f:  # same size, same time
        f.write("F")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert planner(project).decide("first").reasons == ("data.txt was modified after the run",)


def test_an_edit_of_the_same_size_and_time(project):
    for path, text in ((project / "out" / "data.txt", "First data 1"), (project / "planes" / "work.py", None)):
        before = os.stat(path)
        path.write_text(text or path.read_text().replace("FACTOR = 10", "FACTOR = 90"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(path).st_size == before.st_size and known(project) is None
    assert set(reasons(project)["first"]) == {
        "data.txt was modified after the run",
        "global planes.work.FACTOR changed",
    }


def test_edits_in_the_tick_of_the_plan(project):
    "What was written a moment ago may be written again without looking different"
    plan, path = planner(project), project / "nbs" / "other.ipynb"
    for n in range(10, 40):
        finish(plan, "other")
        plan.save()
        edit(path, path.read_text().split('"source": "1 + ')[1].split('"')[0] + '"', f'{n}"')
        assert known(project) is None
        assert planner(project).decide("other").reasons == ("its notebook changed",)
        plan = planner(project)


def test_an_unwritable_folder(tmp_path):
    root = make(tmp_path / "project")
    (root / ".mlnb").write_text("in the way")
    plan = planner(root)
    assert {s.state for s in plan.plan()} == {"outdated"}
    plan.save()
    assert len(plan.warnings) == 1 and "cannot be written" in plan.warnings[0] and ".mlnb" in plan.warnings[0]
    start_fingerprint = plan.begin("other")
    (root / "out").mkdir()
    (root / "out" / "other.ipynb").touch()
    with pytest.raises(PipelineError, match="the products of task 'other' cannot be recorded"):
        plan.commit("other", start_fingerprint, "run", 1)


def test_a_product_that_is_not_there_is_not_recorded(project):
    plan = planner(project)
    start_fingerprint = plan.begin("second")
    (project / "out" / "sum.txt").unlink()
    with pytest.raises(PipelineError, match=r"'second' cannot be recorded: .*sum\.txt"):
        plan.commit("second", start_fingerprint, "run", 1)


def test_a_notebook_that_cannot_be_read(project):
    plan = planner(project)
    (project / "nbs" / "other.ipynb").write_text("{")
    with pytest.raises(PipelineError, match=r"task 'other': .*other\.ipynb is not a notebook"):
        plan.plan()


def test_a_module_that_cannot_be_parsed(project):
    (project / "planes" / "work.py").write_text("def scaled(n:\n")
    (state, _) = planner(project).plan(["second"])
    assert state.reasons[0] == "module planes.work is used now"
    assert state.notes == ("module planes.work counts as a whole: it cannot be parsed",)


def test_the_time_as_a_parameter_is_never_current(tmp_path):
    root = make(tmp_path / "project")
    edit(root / "pipeline.yaml", '"{{n}}"', '"{{now}}"')
    notebook(root / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = None", "1")
    done(root)
    assert known(root) is None


def test_many_planners_at_once(project):
    "Threads of one process share a planner, processes share a folder"
    probe = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_plan as t; from pathlib import Path\n"
        "for _ in range(5):\n    p = t.planner(Path(sys.argv[1])); assert {s.state for s in p.plan()} == "
        "{'current'}; p.save()\n"
        "    assert t.known(Path(sys.argv[1])) in (None, t.ALL)\n    assert not p.warnings, p.warnings"
    )
    command = [sys.executable, "-c", probe, str(project), os.path.dirname(__file__)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    plan = planner(project)
    with ThreadPoolExecutor(4) as pool:
        assert {s.state for s in pool.map(plan.decide, ALL * 10)} == {"current"}
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert states(project) == CURRENT
    left = {p.name for p in (project / ".mlnb/tasks/pipeline").iterdir()}
    assert left == {"@manifest", "@memory.json", *(f"{n}.json" for n in ALL)}


def test_commits_of_several_threads(project):
    plan = planner(project)
    threads = [threading.Thread(target=finish, args=(plan, name)) for name in ("first", "other")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert planner(project).decide("first").state == planner(project).decide("other").state == "current"


# Speed, by what is not done


def test_only_what_changed_is_read_again(project, monkeypatch):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", "1 + 5")
    read_again = []
    original = module.fingerprint.summary
    monkeypatch.setattr(module.fingerprint, "summary", lambda *a: read_again.append(a[0]) or original(*a))
    assert reasons(project) == {"other": ["its notebook changed"]}
    assert read_again == ["__notebook__"]


def test_a_plan_of_nothing_imports_nothing_heavy(project):
    probe = (
        "import sys; from mlnb.cli.main import cli; cli(['plan'], standalone_mode=False)\n"
        "heavy = {'pandas', 'numpy', 'ploomber', 'sqlalchemy', 'yaml', 'nbformat', 'jupyter_client', 'rich'}\n"
        "heavy |= {'asyncio', 'mlnb.pipelines.spec', 'mlnb.notebooks.fingerprint'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", probe], cwd=project, capture_output=True, text=True)
    assert finished.returncode == 0 and "Nothing to do: 3 tasks are current" in finished.stdout, finished.stderr
