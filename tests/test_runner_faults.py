"""Runs that are killed, starved or disturbed: nothing is lost, and a sentence says what happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline_project import FIRST, done, edit, make, notebook
from waiting import is_alive, until

from mlnb.pipelines.runner import load
from mlnb.project.settings import load_settings
from mlnb.records import Records

WAIT = """
import os, time
from pathlib import Path
Path("pid.part").write_text(str(os.getpid()))
os.replace("pid.part", "pid")
while not Path("go").exists():
    time.sleep(0.02)
"""


@pytest.fixture
def project(tmp_path):
    return make(tmp_path / "project")


def run(root, *arguments, **options):
    return load(load_settings(root)).run(*arguments, **options)


def succeeds(root):
    report = run(root)
    assert report.status == "succeeded", [t.error for t in report.tasks]
    return report


def statuses(report):
    return {t.name: t.status for t in report.tasks}


def error_of(report):
    (error,) = [t.error for t in report.tasks if t.status == "failed"]
    return error


def contents(root):
    "What a run has made, executed notebooks by their presence"
    files = sorted(p for p in (root / "out").rglob("*") if p.is_file())
    return {str(p.relative_to(root)): p.read_text() if p.suffix != ".ipynb" else "notebook" for p in files}


def wait_for(path):
    until(path.exists, path)
    return path.read_text()


def beside(root, **options):
    "Start a run in a thread of its own; what comes back waits for the report"
    reports = []
    thread = threading.Thread(target=lambda: reports.append(run(root, **options)))
    thread.start()
    return lambda: (thread.join(), reports[0])[1]


STAGES = {
    "planning": "from mlnb.pipelines.plan import Planner as C; name = 'plan'",
    "first note": "from mlnb.pipelines.recorder import Recorder as C; name = 'start_run'",
    "a task begins": "from mlnb.pipelines.plan import Planner as C; name = 'begin'",
    "the worker starts": "from mlnb.notebooks import kernels as C; name = 'fork_worker'",
    "all is written": "from mlnb.pipelines.products import Staging as C; name = 'check'",
    "the record goes": "from mlnb.pipelines.plan import Planner as C; name = 'forget'",
    "products move": "from mlnb.pipelines.products import Staging as C; name = 'publish'",
    "between two products": "import mlnb.pipelines.products as C; name = '_move_into_place'; after = 2",
    "the record comes": "from mlnb.pipelines.plan import Planner as C; name = 'commit'",
    "the second record": "from mlnb.pipelines.plan import Planner as C; name = 'commit'; after = 2",
    "last note": "from mlnb.pipelines.recorder import Recorder as C; name = 'end_run'",
    "the manifest": "from mlnb.pipelines.plan import Planner as C; name = 'save'",
}


@pytest.mark.parametrize("again", [False, True], ids=["first run", "over older products"])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage(project, stage, again):
    "kill -9, then mlnb run: the same products as of a run that nobody disturbed"
    if again:
        succeeds(project)
        (project / "env.yaml").write_text("n: 3\n")
    program = textwrap.dedent(f"""
        import os, signal
        after = 1
        {STAGES[stage]}
        whole, calls = getattr(C, name), []

        def killing(*arguments, **options):
            calls.append(1)
            if len(calls) >= after:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments, **options)

        setattr(C, name, killing)
        from mlnb.pipelines.runner import load
        from mlnb.project.settings import load_settings
        load(load_settings()).run(jobs=1)
    """)
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    succeeds(project)
    n = 3 if again else 1
    notebooks = dict.fromkeys(("out/first.ipynb", "out/second.ipynb", "out/other.ipynb"), "notebook")
    assert contents(project) == {
        "out/data.txt": str(10 * n),
        "out/folder/part": "part",
        "out/sum.txt": str(10 * n + 1),
        **notebooks,
    }
    assert set(statuses(run(project)).values()) == {"skipped"}
    assert not list((project / "out").glob(".*"))


def test_a_kernel_that_is_killed(project):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", WAIT)
    finish = beside(project, only=["other"])
    os.kill(int(wait_for(project / "pid")), signal.SIGKILL)
    assert "other.ipynb, cell [3]: its kernel died" in error_of(finish())
    (project / "go").touch()
    assert statuses(run(project, ["other"])) == {"other": "executed"}


def test_a_worker_that_is_killed(project):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", WAIT)
    workers = []
    from mlnb.notebooks import kernels

    fork = kernels.fork_worker
    kernels.fork_worker = lambda *a, **k: workers.append(fork(*a, **k)) or workers[-1]
    try:
        finish = beside(project, keep_going=True, jobs=1)
        kernel = int(wait_for(project / "pid"))
        workers[-1].kill()
        report = finish()
    finally:
        kernels.fork_worker = fork
    assert statuses(report) == {"first": "executed", "second": "executed", "other": "failed"}
    assert "the process that executed it ended by SIGKILL" in error_of(report)
    until(lambda: not Path(f"/proc/{kernel}").exists(), "the end of its kernel")


@pytest.mark.long
def test_a_fork_server_that_is_killed(project, tmp_path, monkeypatch):
    "What runs goes on, what comes later starts cold or from a new server"
    from mlnb.notebooks import kernels

    runtime = Path(tempfile.mkdtemp(prefix="mlnb-"))
    monkeypatch.setenv("MLNB_RUNTIME_DIR", str(runtime))
    try:
        kernels.fork_worker("builtins:repr").wait()
        notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", WAIT)
        finish = beside(project, only=["other"])
        wait_for(project / "pid")
        for server in kernels.status():
            os.kill(server["pid"], signal.SIGKILL)
        (project / "go").touch()
        assert statuses(finish()) == {"other": "executed"}
        assert set(statuses(run(project)).values()) == {"executed", "skipped"}
    finally:
        kernels.stop(kill=True)
        shutil.rmtree(runtime, ignore_errors=True)


def test_a_link_as_a_product_is_kept_as_a_link(project):
    "A task that names its newest version by a link, twice: the version is left alone"
    (project / "versions").mkdir()
    (project / "versions" / "v1.txt").write_text("precious")
    edit(project / "pipeline.yaml", "product: out/other.ipynb", "product: {nb: out/other.ipynb, latest: out/latest}")
    body = 'import os\nos.symlink(os.path.abspath("versions/v1.txt"), product["latest"])'
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", body)
    for _ in range(2):
        assert statuses(run(project, ["other"], force=True)) == {"other": "executed"}
        assert (project / "versions" / "v1.txt").read_text() == "precious"
    assert os.readlink(project / "out" / "latest") == f"{project}/versions/v1.txt"
    assert statuses(run(project, ["other"])) == {"other": "skipped"}
    (project / "versions" / "v1.txt").write_text("changed")
    assert statuses(run(project, ["other"])) == {"other": "executed"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_answers_signals_while_it_reads_a_product_without_end(project, number):
    "A file of four terabytes; a FIFO is refused before anybody opens it"
    body = "import os\nos.truncate(os.open(product['nb'] + '.part', os.O_CREAT | os.O_WRONLY), 1 << 42)"
    body += "\nos.mkdir(product['big'])\nos.rename(product['nb'] + '.part', product['big'] + '/part')"
    edit(project / "pipeline.yaml", "product: out/other.ipynb", "product: {nb: out/other.ipynb, big: out/big}")
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", body)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlnb.cli.main", "run", "other"], cwd=project, stderr=subprocess.PIPE, text=True
    )
    until((project / "out" / "big").exists, "its product")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number] and "Traceback" not in errors
    assert "continue with: mlnb run --resume" in errors


def test_a_run_ends_though_a_thread_of_it_hangs(project, monkeypatch):
    "As one does that waits for a network drive: it is abandoned after its time"
    program = """
        import os, threading, time
        from mlnb.pipelines import plan, runner
        runner.INTERRUPT_GRACE_SECONDS = runner.KILL_WAIT_SECONDS = 1
        plan.Planner.begin = lambda *_: (open("pid", "w").write(str(os.getpid())), time.sleep(1000))
        from mlnb.cli.main import main
        main()
    """
    arguments = [sys.executable, "-c", textwrap.dedent(program), "run", "other"]
    process = subprocess.Popen(arguments, cwd=project, stderr=subprocess.PIPE, text=True)
    wait_for(project / "pid")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "continue with: mlnb run --resume" in errors


def test_what_a_killed_run_leaves_is_removed_by_the_next_command(project):
    "By any plan, though the task is not asked for, and though nothing is to do"
    done(project)
    before = contents(project)
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", WAIT)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlnb.cli.main", "run", "other"], cwd=project, stderr=subprocess.DEVNULL
    )
    wait_for(project / "pid")
    plan = [sys.executable, "-m", "mlnb.cli.main", "plan", "first"]
    subprocess.run(plan, cwd=project, check=True, stdout=subprocess.DEVNULL)
    assert (project / "out" / ".stage-pipeline-other").exists(), "a run that goes on is left alone"
    process.kill()
    process.wait()
    assert "Nothing to do" in subprocess.run(plan, cwd=project, check=True, capture_output=True, text=True).stdout
    assert not list((project / "out").glob(".*")) and contents(project) == before
    assert not list((project / ".mlnb" / "stages" / "pipeline").iterdir())


def test_retries(project):
    flaky = "from pathlib import Path\ntries = Path('tries')\ncount = len(tries.read_text()) if tries.exists() else 0\n"
    flaky += "tries.write_text('x' * (count + 1))\nassert count >= 2, f'try {count + 1}'"
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", flaky)
    text = (project / "pipeline.yaml").read_text()
    more = "product: out/other.ipynb\n    retries: 2\n    retry_delay: 0.01"
    (project / "pipeline.yaml").write_text(text.replace("product: out/other.ipynb", more))
    events = []
    (report,) = run(project, ["other"], on_event=events.append).tasks
    assert (report.status, report.attempts) == ("executed", 3)
    assert [e.error.split(";")[0][-5:] for e in events if e.status == "retry"] == ["try 1", "try 2"]


def test_keep_going_or_stop(project):
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = 1", "1 / 0")
    assert statuses(run(project, jobs=1)) == {"first": "failed", "second": "aborted", "other": "aborted"}
    assert statuses(run(project, jobs=1, keep_going=True)) == {
        "first": "failed",
        "second": "aborted",
        "other": "executed",
    }


def test_side_by_side(project):
    "Two notebooks that wait for each other end only if both run at the same time"
    meet = "import time\nfrom pathlib import Path\nPath('{}').touch()\n"
    meet += "while not Path('{}').exists():\n    time.sleep(0.02)"
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", meet.format("a", "b"))
    text = (project / "nbs" / "first.ipynb").read_text()
    (project / "nbs" / "first.ipynb").write_text(
        text.replace("from pathlib import Path", meet.format("b", "a").replace("\n", "\\n"), 1)
    )
    assert set(statuses(run(project, jobs=2)).values()) == {"executed"}


def test_what_the_machine_does_not_have(project):
    text = (project / "pipeline.yaml").read_text()
    (project / "pipeline.yaml").write_text(
        text.replace("product: out/other.ipynb", "product: out/other.ipynb\n    gpu: 99")
    )
    assert "it needs gpu: 99, this machine has" in error_of(run(project, ["other"]))


def test_a_task_that_never_ends(project):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", WAIT)
    text = (project / "pipeline.yaml").read_text()
    (project / "pipeline.yaml").write_text(
        text.replace("product: out/other.ipynb", "product: out/other.ipynb\n    timeout: 1.5")
    )
    assert "cell [3]: the notebook took longer than 1.5 seconds" in error_of(run(project, ["other"]))


def test_a_truncated_product_and_a_truncated_copy(project):
    report = run(project)
    copy = Path(report.tasks[0].notebook)
    copy.write_text(copy.read_text()[:100])
    assert set(statuses(run(project)).values()) == {"skipped"}, "a copy is a log, nothing depends on it"
    product = project / "out" / "other.ipynb"
    product.write_text(product.read_text()[:100])
    assert statuses(run(project))["other"] == "executed"
    json.loads(product.read_text())


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 1 MB"
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full(project, small_disk):
    (project / "out").symlink_to(small_disk)
    succeeds(project)
    before = contents(project)
    body = (
        "from pathlib import Path\nPath(product['folder']).mkdir()\nPath(product['data']).write_text('x' * 5_000_000)"
    )
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = 1", body)
    error = error_of(run(project))
    assert "No space left on device" in error
    (small_disk / "filler").write_bytes(b"x" * 900_000)
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = 1", f"'{'y' * 400_000}'; 1")
    (project / "pipeline.yaml").write_text(
        "tasks: [{name: first, source: nbs/first.ipynb, product: {nb: out/first.ipynb}}]\n"
    )
    assert f"No space left on device: {small_disk}/.stage-pipeline-first" in error_of(run(project))
    (small_disk / "filler").unlink()
    assert contents(project) == before, "earlier products are whole"


def test_a_disk_that_is_full_of_records(project, small_disk):
    (project / ".mlnb").symlink_to(small_disk)
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb") as f:
        while True:
            f.write(b"x" * 4096)
            f.flush()
    done = subprocess.run([sys.executable, "-m", "mlnb.cli.main", "run"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 1 and f"No space left on device: {small_disk}/locks" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    filler.unlink()
    succeeds(project)


@pytest.fixture
def read_only(tmp_path):
    "A folder that nobody can write to, root neither"
    folder = tmp_path / "read-only"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True)
    if done.returncode:
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("no folder here is unwritable")
    yield folder
    if not done.returncode:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("name", ["out", ".mlnb"])
def test_an_unwritable_folder(project, read_only, name):
    (project / name).symlink_to(read_only)
    done = subprocess.run([sys.executable, "-m", "mlnb.cli.main", "run"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert str(read_only) in done.stderr or f"{name}" in done.stderr
    assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr


def test_resume_takes_parameters_and_selection_of_the_run(project):
    mlnb = [sys.executable, "-m", "mlnb.cli.main", "run"]
    path = project / "nbs" / "second.ipynb"
    good = path.read_text()
    path.write_text(good.replace("+ extra", "+ missing"))
    done = subprocess.run([*mlnb, "second", "--param", "n=7"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 1 and "mlnb run --resume" in done.stderr
    path.write_text(good)
    done = subprocess.run([*mlnb, "--resume", "last", "--json"], cwd=project, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert {t["name"]: t["status"] for t in report["tasks"]} == {"first": "skipped", "second": "executed"}
    assert (project / "out" / "sum.txt").read_text() == "71"
    records = Records(load_settings(project).url("sqlite:///.mlnb/records.db"))
    newest, earlier = records.runs()
    records.close()
    assert newest["resumed"] == earlier["id"]
    done = subprocess.run([*mlnb, "--resume", "last"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 2 and "succeeded, so there is nothing to resume" in done.stderr


def test_resume_reads_a_mended_env(project):
    "What env.yaml says is mended there; only what the command line said is kept"
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = 1", "assert n != 1, n", FIRST)
    (failed,) = [t for t in run(project, "first").tasks if t.status == "failed"]
    assert "AssertionError: 1" in failed.error
    (project / "env.yaml").write_text("n: 2\n")
    mlnb = [sys.executable, "-m", "mlnb.cli.main", "run", "--resume", "last"]
    done = subprocess.run(mlnb, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (project / "out" / "data.txt").read_text() == "20"


def test_a_failure_with_very_much_to_say_is_its_own_alone(project):
    notebook(project / "nbs" / "other.ipynb", "upstream = None\nproduct = None", "raise ValueError('x' * 5_000_000)")
    report = run(project, keep_going=True)
    assert statuses(report) == {"first": "executed", "second": "executed", "other": "failed"}
    assert "ValueError: xxx" in error_of(report) and len(error_of(report)) < 30_000


def test_two_pipelines_at_once_write_apart(project):
    "Both have a task `first`, whose products lie in one folder"
    product = "{nb: out/again.ipynb, data: out/again.txt, folder: out/again}"
    (project / "again.yaml").write_text(f"tasks:\n- {{name: first, source: nbs/quick.ipynb, product: {product}}}\n")
    notebook(project / "nbs" / "first.ipynb", "upstream = None\nproduct = None\nn = 1", FIRST, WAIT)
    notebook(project / "nbs" / "quick.ipynb", "upstream = None\nproduct = None\nn = 1", FIRST)
    finish = beside(project, only=["first"])
    wait_for(project / "pid")
    report = load(replace(load_settings(project), pipeline="again.yaml")).run(["first"])
    (project / "go").touch()
    assert statuses(report) == statuses(finish()) == {"first": "executed"}
    assert (project / "out" / "data.txt").read_text() == (project / "out" / "again.txt").read_text() == "10"


def test_a_project_can_be_moved(project, tmp_path):
    succeeds(project)
    shutil.move(project, tmp_path / "moved")
    assert set(statuses(run(tmp_path / "moved")).values()) <= {"skipped", "executed"}


SLOW = """
from pathlib import Path
import time
from planes.work import scaled
with Path("count").open("a") as f:
    f.write("x")
value = scaled(2)
Path(product["data"]).write_text("begun")
time.sleep(1.1)
"""
LONG_PIPELINE = "tasks:\n- {name: long, source: nbs/long.ipynb, product: {nb: out/long.ipynb, data: out/long.txt}}\n"


def write_long(root, slow, then):
    "The notebook of a task that takes a second, and then does something quickly"
    end = "Path(product['data']).write_text(str(value))"
    notebook(root / "nbs" / "long.ipynb", "upstream = None\nproduct = None", slow, then, end)


@pytest.fixture
def suspended(project):
    "A project whose task failed after a second: its third cell is wrong"
    (project / "pipeline.yaml").write_text(LONG_PIPELINE)
    write_long(project, SLOW, "1 / 0")
    report = run(project)
    assert "ZeroDivisionError" in error_of(
        report
    ) and f"mlnb run --resume {report.run} resumes after cell [" in error_of(report)
    assert "mlnb kernels stop" in error_of(report)
    yield project, report.run
    from mlnb.notebooks import checkpoints

    checkpoints.release_all(project / ".mlnb" / "checkpoints" / "pipeline" / "long")


def test_resume_goes_on_inside_the_notebook(suspended):
    project, failed = suspended
    write_long(project, SLOW, "1 / 1")
    events = []
    report = run(project, resumed=failed, on_event=events.append)
    assert statuses(report) == {"long": "executed"}, report
    assert next(e.reason for e in events if e.status == "resumed").startswith("resumes after cell [")
    assert (project / "count").read_text() == "x" and (project / "out" / "long.txt").read_text() == "20"
    copy = json.loads((project / "out" / "long.ipynb").read_text())
    assert [c["execution_count"] is not None for c in copy["cells"] if c["cell_type"] == "code"] == [True] * 5
    assert set(statuses(run(project)).values()) == {"skipped"}
    assert not list((project / "out").glob(".*")) and not list(
        (project / ".mlnb" / "checkpoints" / "pipeline" / "long").glob("*.copy")
    )


def use_another(root):
    "Change a function that the failed notebook did not use, and mend the notebook by it"
    edit(root / "planes" / "work.py", "    return n\n", "    return -n\n")
    write_long(root, SLOW, "from planes.work import unused\nvalue = unused(value)")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda p: (p / "planes" / "work.py").write_text(
                (p / "planes" / "work.py").read_text().replace("= 10", "= 30")
            ),
            "FACTOR changed",
        ),
        (use_another, "module planes.work changed after its checkpoint"),
        (
            lambda p: (p / "out" / ".stage-pipeline-long" / "long.txt").write_text("touched"),
            "long.txt has been changed since",
        ),
        (lambda p: write_long(p, SLOW + "value = 3", "1 / 1"), "has changed"),
    ],
    ids=["library", "another function", "product", "earlier cell"],
)
def test_resume_says_why_it_begins_anew(suspended, change, says):
    project, failed = suspended
    write_long(project, SLOW, "1 / 1")
    change(project)
    events = []
    report = run(project, resumed=failed, on_event=events.append)
    assert statuses(report) == {"long": "executed"}, report
    (reason,) = [e.reason for e in events if e.status == "resumed"]
    assert reason.startswith("starts from its first cell: ") and says in reason
    assert (project / "count").read_text() == "xx"


def test_the_copy_of_a_kernel_is_shown_and_ended(suspended):
    project, failed = suspended
    call = [sys.executable, "-c", "from mlnb.cli.main import main; main()", "kernels"]
    told = lambda *words: subprocess.run([*call, *words], cwd=project, capture_output=True, text=True).stdout
    note = json.loads((project / ".mlnb" / "checkpoints" / "pipeline" / "long.json").read_text())
    pid = note["checkpoint"]["pid"]
    assert [c["pid"] for c in json.loads(told("--json")) if "socket" in c] == [pid]
    shown = next(line for line in told().splitlines() if line.split()[0] == str(pid))
    assert "snapshot" in shown and "of task long, until " in shown
    assert told("stop", str(pid)) == f"{pid}, a kernel snapshot, has ended\n"
    until(lambda: not is_alive(pid))
    assert [c for c in json.loads(told("--json")) if "socket" in c] == []
    write_long(project, SLOW, "1 / 1")
    assert statuses(run(project, resumed=failed)) == {"long": "executed"}


def test_a_plain_run_begins_anew(suspended):
    project, _ = suspended
    write_long(project, SLOW, "1 / 1")
    assert statuses(run(project)) == {"long": "executed"}
    assert (project / "count").read_text() == "xx"
    assert not list((project / ".mlnb" / "checkpoints" / "pipeline" / "long").glob("*.copy"))
