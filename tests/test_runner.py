"""The pipeline on real kernels: what re-runs, what is left in place, who may run, how it ends."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_project import make, notebook
from waiting import is_alive, until

from mlnb.pipelines.runner import load
from mlnb.project.errors import MlnbError, PipelineError
from mlnb.project.settings import load_settings
from mlnb.records import Records

FIRST_RUN = {"first": "executed", "second": "executed", "other": "executed"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A project that has run once; copy it, do not change it"
    root = make(tmp_path_factory.mktemp("done") / "project")
    assert statuses(root) == FIRST_RUN
    return root


@pytest.fixture
def project(done, tmp_path):
    "A copy of a project that has run, for which nothing is to do"
    subprocess.run(["cp", "-a", done, tmp_path / "project"], check=True)
    return tmp_path / "project"


def run(root, only=None, force=False, on_event=None, **parameters):
    return load(load_settings(root), parameters).run(only, force=force, on_event=on_event)


def statuses(root, *arguments, **options):
    return {t.name: t.status for t in run(root, *arguments, **options).tasks}


def only(*executed):
    return {name: "executed" if name in executed else "skipped" for name in FIRST_RUN}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_nothing_to_do_then_touched_and_commented(project):
    assert statuses(project) == only()
    edit(project / "planes" / "work.py", "    return n * FACTOR", "    # by a factor\n    return n * FACTOR")
    edit(project / "planes" / "work.py", "return n\n", "return -n\n")
    edit(project / "nbs" / "first.ipynb", "write_text(str(scaled(n)))", "write_text( str(scaled(n)) )  # text")
    os.utime(project / "out" / "data.txt")
    assert statuses(project) == only()


def test_a_library_function_re_runs_what_depends_on_it(project):
    edit(project / "planes" / "work.py", "FACTOR = 10", "FACTOR = 20")
    reasons = {}
    run(project, on_event=lambda e: reasons.update({e.task: e.reason}) if e.status == "started" else None)
    assert reasons == {"first": "global planes.work.FACTOR changed", "second": "output of first changed"}
    assert (project / "out" / "sum.txt").read_text() == "21"


def test_a_change_within_a_second_of_the_last_run_that_keeps_the_size(project):
    module = project / "planes" / "work.py"
    for compiled in module.parent.glob("__pycache__/work.*"):
        compiled_at = int(compiled.stat().st_mtime)
        header = compiled.read_bytes()
        compiled.write_bytes(header[:8] + compiled_at.to_bytes(4, "little") + header[12:])
        os.utime(compiled, (compiled_at, compiled_at))
    edit(module, "FACTOR = 10", "FACTOR = 20")
    os.utime(module, (compiled_at, compiled_at))
    assert statuses(project) == only("first", "second")
    assert (project / "out" / "sum.txt").read_text() == "21"


def test_an_equal_result_stops_there(project):
    edit(project / "planes" / "work.py", "return n * FACTOR", "return FACTOR * n")
    assert statuses(project) == only("first")


def test_a_parameter_flows(project):
    assert statuses(project, n=3) == only("first", "second")
    assert (project / "out" / "sum.txt").read_text() == "31"
    assert statuses(project, n=3, extra=2) == only("second")
    records = Records(load_settings(project).url("sqlite:///.mlnb/records.db"))
    newest = records.runs()[0]
    assert newest["parameters"] == {"n": 3, "extra": 2} and newest["status"] == "succeeded"
    tasks = {t["name"]: t for t in records.tasks(newest["id"])}
    records.close()
    assert {n: t["status"] for n, t in tasks.items()} == only("second")
    kept = project / ".mlnb" / "runs" / newest["id"] / "second.ipynb"
    assert tasks["second"]["notebook"] == str(kept) and tasks["first"]["notebook"] is None
    assert str(project / "out" / "sum.txt") in kept.read_text() and ".stage-" not in kept.read_text()


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda out: (out / "data.txt").write_text("99"), "first"),
        (lambda out: (out / "folder" / "part").write_text("x"), "first"),
        (lambda out: (out / "folder" / "more").touch(), "first"),
        (lambda out: (out / "sum.txt").unlink(), "second"),
    ],
)
def test_damaged_products_are_made_again(project, damage, again):
    damage(project / "out")
    assert statuses(project) == only(again)
    assert (project / "out" / "sum.txt").read_text() == "11"


def test_half_of_the_products(project):
    edit(project / "nbs" / "first.ipynb", 'Path(product[\\"data\\"]).write_text(str(scaled(n)))', "0")
    report = run(project)
    assert report.status == "failed"
    assert [t.status for t in report.tasks] == ["failed", "aborted", "skipped"]
    assert f"task 'first' ended without writing data ({project / 'out' / 'data.txt'})" in report.tasks[0].error
    assert (project / "out" / "data.txt").read_text() == "10" and (project / "out" / "folder" / "part").exists()
    assert not list((project / "out").glob(".stage-*"))
    assert [t.status for t in run(project).tasks] == ["failed", "aborted", "skipped"]


def test_a_raising_notebook_and_the_way_back(project):
    before = (project / "nbs" / "first.ipynb").read_text()
    edit(
        project / "nbs" / "first.ipynb", "write_text(str(scaled(n)))", "write_text('bad'); raise ValueError('no rows')"
    )
    report = run(project)
    assert "first.ipynb, cell [3]: ValueError: no rows; the executed copy is" in report.tasks[0].error
    assert "no rows" in Path(report.tasks[0].notebook).read_text()
    assert (project / "out" / "data.txt").read_text() == "10"
    (project / "nbs" / "first.ipynb").write_text(before)
    assert statuses(project) == only()


def test_some_tasks_and_force(project):
    assert statuses(project, ["second"], force=True) == {"first": "skipped", "second": "executed"}
    assert statuses(project, ["other"]) == {"other": "skipped"}
    with pytest.raises(PipelineError, match=r"there is no task 'secund' \(did you mean 'second'\?\)"):
        run(project, ["secund"])


def test_a_folder_replaces_a_file_and_the_reverse(project):
    body = """
        from pathlib import Path
        Path(product["folder"]).write_text("x")
        Path(product["data"]).mkdir()
        Path(product["data"], "y").touch()
    """
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = 1", body)
    assert statuses(project, ["first"]) == {"first": "executed"}
    assert (project / "out" / "folder").is_file() and (project / "out" / "data.txt" / "y").exists()


def test_the_notebook_that_was_executed_counts(project):
    "An edit while the task runs makes the next run do it again"
    path = project / "nbs" / "other.ipynb"

    def change(event):
        if event.task == "other" and event.status == "cell" and event.cell == 1:
            edit(path, "1 + 1", "1 + 2")

    assert statuses(project, ["other"], force=True, on_event=change) == {"other": "executed"}
    assert statuses(project, ["other"]) == {"other": "executed"}


def test_a_second_run_is_refused(project):
    lock = project / ".mlnb" / "locks" / "pipeline.lock"
    with lock.open("a+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        holder.write("process 1 of somebody")
        holder.flush()
        with pytest.raises(MlnbError, match="is being run by process 1 of somebody; wait until it has ended"):
            run(project)
    assert statuses(project) == only()


def command(root, *words):
    program = [sys.executable, "-c", "from mlnb.cli.main import main; main()", "run", *words]
    return subprocess.Popen(program, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    until(lambda: path.exists() or process.poll() is not None, path)
    assert process.poll() is None, process.communicate()
    return int(path.read_text())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_ended_from_outside(project, number, code):
    body = "import os\nfrom pathlib import Path\n"
    body += "Path('pid.part').write_text(str(os.getpid()))\nos.replace('pid.part', 'pid')"
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", body, "import time; time.sleep(120)")
    process = command(project)
    kernel = wait_for(project / "pid", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in errors
    until(lambda: not is_alive(kernel), "the end of its kernel")
    with (project / ".mlnb" / "locks" / "pipeline.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if number != signal.SIGKILL:
        records = Records(load_settings(project).url("sqlite:///.mlnb/records.db"))
        newest = records.runs()[0]
        assert newest["status"] == "interrupted"
        assert {t["name"]: t["status"] for t in records.tasks(newest["id"])}["other"] == "failed"
        records.close()


def test_from_a_notebook_that_is_open(project, tmp_path):
    "In a kernel an event loop is running: a pipeline runs from there as from a terminal"
    from mlnb.notebooks.execute import execute

    body = """
        import asyncio
        asyncio.get_running_loop()
        from mlnb.pipelines.runner import load
        from mlnb.project.settings import load_settings
        report = load(load_settings(), {"n": 4}).run(["first"])
        assert [t.status for t in report.tasks] == ["executed"], report
    """
    execute(notebook(tmp_path / "open.ipynb", None, body), tmp_path / "out.ipynb", cwd=project)
    assert (project / "out" / "data.txt").read_text() == "40"
