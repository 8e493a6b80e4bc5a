"""mlnb runs as a program, over a history that is written here."""

import json
import os
import sqlite3
import subprocess

import pytest
import warm_cli

from mlnb.cli import runs
from mlnb.monitoring import notify
from mlnb.pipelines.recorder import JOURNAL, Recorder
from mlnb.records import Records

OLD, NEW = "20260101T120000-aaaa01", "20260301T120000-bbbb02"
PRINT = {"notebook": "111111", "code": {"planes.work.scaled": ["function", "222222"]}, "packages": {"pandas": "3.0.1"}}


@pytest.fixture
def project(tmp_path):
    (root := tmp_path / "project").mkdir()
    (root / "pyproject.toml").write_text('[project]\nname = "planes"\n\n[tool.mlnb]\n')
    records = Records(f"sqlite:///{root}/.mlnb/records.db")
    for run_id, seed, auc in ((OLD, 0, 0.75), (NEW, 1, 0.76)):
        month = run_id[4:6]
        row = {
            "pipeline": "planes",
            "parameters": {"seed": seed, "device": "cpu"},
            "status": "succeeded" if seed else "failed",
        }
        row |= {"started": f"2026-{month}-01T12:00:00", "ended": f"2026-{month}-01T12:01:40", "process": "7@elsewhere"}
        row |= {
            "code": {"commit": f"{seed}" * 40, "dirty": bool(seed)},
            "resumed": OLD if seed else None,
            "selection": {"force": True},
        }
        records.put([("run", {"id": run_id}, row)])
        notebook = root / ".mlnb" / "runs" / run_id / "train.ipynb"
        notebook.parent.mkdir(parents=True)
        notebook.write_text("{}")
        part = PRINT | {"notebook": "99999" + str(seed), "packages": {"pandas": f"3.0.{seed}"}}
        part |= {"code": {"planes.work.Planes": ["class", f"44444{seed}"]}}
        records.put_task(run_id, "ingest", status="skipped", fingerprint=PRINT)
        records.put_task(
            run_id, "train", status="executed", seconds=10 + seed, attempts=1 + seed,
            reason="function planes.work.scaled changed",
            metrics={"auc": auc, "rows": 7.0}, notebook=notebook, fingerprint=part,
        )  # fmt: skip
        if not seed:
            records.put_task(
                run_id, "register", status="failed", seconds=0.5, error="KeyError: '[bold]gone[/]'", cell=4
            )
    records.close()
    return root


def mlnb(root, *words, stdin="", **variables):
    environ = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TZ": "UTC"} | variables
    return warm_cli.run(["runs", *words], cwd=root, env=environ, input=stdin)


def document(root, *words):
    done = mlnb(root, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ids(root):
    return [r["id"] for r in document(root)]


def test_the_list(project):
    done = mlnb(project)
    head, new, old = done.stdout.splitlines()
    assert head.split() == ["run", "started", "took", "status", "ran", "skip", "fail", "parameters"]
    assert new.split() == ["bbbb02", "2026-03-01", "12:00", "1", "min", "40", "s", "succeeded", "1", "1", "seed=1"]
    assert old.split()[-4:] == ["failed", "1", "1", "1"]
    newest, oldest = document(project)
    assert (newest["changed"], oldest["changed"]) == ({"seed": [0, 1]}, {}) and newest[
        "started"
    ] == "2026-03-01T12:00:00+00:00"
    assert newest["tasks"] == {"executed": 1, "skipped": 1} and newest["seconds"] == 100
    assert [r["id"] for r in document(project, "--status", "failed")] == [OLD]
    assert document(project, "--limit", "1")[0]["changed"] == {"seed": [0, 1]}


def test_eighty_columns_are_enough(project):
    for words in ((), ("show",), ("compare",)):
        done = mlnb(project, *words, COLUMNS="80")
        lines = [line for line in done.stdout.splitlines() if not line.startswith(("train  .mlnb", "Task register"))]
        assert done.returncode == 0 and max(map(len, lines)) <= 80, done.stdout


def test_one_run(project):
    shown = mlnb(project, "show", "aaaa01").stdout
    for words in (
        "Run " + OLD,
        "failed",
        "seed=0, device=cpu",
        "0000000000",
        "force: true",
        "function planes.work.scaled changed",
        "0.75",
    ):
        assert words in shown
    assert "Task register failed in cell 4: KeyError: '[bold]gone[/]'" in shown
    assert f"train     .mlnb/runs/{OLD}/train.ipynb" in shown
    shown = document(project, "show", "last")
    assert (shown["id"], shown["resumed"]) == (NEW, OLD) and [t["name"] for t in shown["tasks"]] == ["ingest", "train"]
    assert shown["tasks"][1]["metrics"] == {"auc": 0.76, "rows": 7.0} and shown["tasks"][1]["attempts"] == 2
    assert "with uncommitted changes" in mlnb(project, "show").stdout


def test_two_runs(project):
    shown = mlnb(project, "compare", "last~1", "last").stdout
    same = "1 more metric without a difference"
    assert "class planes.work.Planes changed" in shown and "['class'" not in shown
    for words in (
        "train: its notebook changed",
        "train: pandas 3.0.0 is now 3.0.1",
        "+0.01",
        "+1.0",
        same,
        "not in this run",
    ):
        assert words in shown, shown
    assert "rows" not in shown and "rows" in mlnb(project, "compare", "--all").stdout
    found = document(project, "compare")
    assert found["runs"] == [OLD, NEW] and found["parameters"] == {"seed": [0, 1]}
    assert [t["name"] for t in found["tasks"]] == ["ingest", "train", "register"]
    assert found["tasks"][1]["metrics"]["auc"] == [0.75, 0.76] and found["tasks"][1]["seconds"] == [10, 11]


def test_metrics_of_a_task_that_one_run_did_not_run_are_a_line(project):
    records = Records(f"sqlite:///{project}/.mlnb/records.db")
    records.put_task(OLD, "evaluate", status="executed", seconds=3, metrics={f"cost_{i}": 0.5 + i for i in range(200)})
    records.close()
    shown = mlnb(project, "compare").stdout
    assert (
        "evaluate: 200 metrics in aaaa01 only; --all shows them." in shown
        and "cost_7" not in shown
        and "+0.01" in shown
    )
    assert "cost_199" in mlnb(project, "compare", "--all").stdout


def test_the_executed_notebook(project):
    path = str(project / ".mlnb" / "runs" / NEW / "train.ipynb")
    for words in (("open", "last", "train"), ("open", "bbbb", "train", "--print")):  # a pipe opens nothing
        done = mlnb(project, *words)
        assert (done.returncode, done.stdout.strip()) == (0, path)
    assert document(project, "open", "last", "train") == {"run": NEW, "task": "train", "notebook": path}


def test_mistakes(project):
    os.remove(project / ".mlnb" / "runs" / NEW / "train.ipynb")
    wrong = {
        ("show", "aaaa02"): (1, "there is no run 'aaaa02' (did you mean 'aaaa01'?)"),
        ("show", "2026"): (1, "'2026' may be any of 2 runs"),
        ("compare", "last~2"): (1, "there is no run 'last~2': the first one is last~1"),
        ("open", "last", "trian"): (1, "has no task 'trian' (did you mean 'train'?); tasks are ingest, train"),
        ("open", "last", "ingest"): (1, "was skipped in run"),
        ("open", "last", "train"): (1, "it was removed, or run"),
        ("compere",): (2, "did you mean 'compare'?"),
        ("bbbb02",): (2, "to see a run: mlnb runs show bbbb02"),
        ("prune",): (2, "choose what to keep"),
        ("prune", "--keep", "1", "--json"): (2, "--json cannot ask"),
        ("--status", "done"): (2, "done"),
    }
    for words, (code, says) in wrong.items():
        done = mlnb(project, *words)
        assert (
            done.returncode == code and says in done.stderr and done.stdout == "" and "Traceback" not in done.stderr
        ), (words, done)


def test_old_runs_go_when_asked(project):
    folder = project / ".mlnb" / "runs"
    done = mlnb(project, "prune", "--keep", "1", stdin="n\n")
    assert done.returncode == 1 and ids(project) == [NEW, OLD]
    done = mlnb(project, "prune", "--keep", "1", stdin="y\n")
    assert done.returncode == 0 and "Removed 1 run," in done.stdout
    assert ids(project) == [NEW] == [p.name for p in folder.iterdir()]
    assert "No run is old enough" in mlnb(project, "prune", "--older-than", "36500").stdout


def test_what_is_never_removed(project):
    records = Records(f"sqlite:///{project}/.mlnb/records.db")
    records.put(
        [
            (
                "run",
                {"id": "20250101T000000-cccc03"},
                {"pipeline": "other", "started": "2025-01-01T00:00:00", "status": "failed"},
            )
        ]
    )
    running = records.start_run("planes", {})
    assert sorted(document(project, "prune", "--older-than", "0", "--yes")["removed"]) == [OLD, NEW]
    assert {r["id"] for r in records.runs()} == {running, "20250101T000000-cccc03"}
    assert ids(project) == [running] and [r["pipeline"] for r in document(project, "--pipeline", "other")] == ["other"]
    records.close()


def test_runs_that_only_a_journal_knows(project):
    recorder = Recorder(f"sqlite:///{project}/.mlnb/records.db", project / ".mlnb" / "runs")
    run = recorder.start_run("planes", {"seed": 2})
    recorder.put_task(run, "train", status="executed")
    recorder.end_run(run, "succeeded")
    recorder.close(wait=False)
    assert ids(project) == [run, NEW, OLD] and not (project / ".mlnb" / "runs" / run / JOURNAL).exists()


def test_what_is_locked_can_be_read(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setattr(Records.__init__, "__defaults__", (".", 0.1))
    journal = project / ".mlnb/runs/20260401T120000-cccc03" / JOURNAL
    journal.parent.mkdir()
    journal.write_text('["run", {"id": "20260401T120000-cccc03"}, {"pipeline": "planes", "status": "failed"}]\n')
    holder = sqlite3.connect(project / ".mlnb/records.db", isolation_level=None)
    holder.execute("begin immediate")
    with runs._open_records() as (settings, records):
        assert [run["id"] for run in records.runs()] == [NEW, OLD]
        notify._replay(records, settings.path(".mlnb/runs"))
    holder.close()
    assert "database is locked" in capsys.readouterr().err and journal.exists()


def test_before_the_first_run(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    done = mlnb(tmp_path)
    assert done.returncode == 0 and "start one with: mlnb run" in done.stdout and document(tmp_path) == []
    done = mlnb(tmp_path, "show")
    assert done.returncode == 1 and "there are no runs yet, start one with: mlnb run" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["pyproject.toml"]


DAMAGE = {
    "another file": lambda content: b"not a database" * 1000,
    "its pages are overwritten": lambda content: content[:4096] + b"\xaa" * (len(content) - 4096),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_records_come_with_the_way_out(project, damage):
    "The message names the journals and the command, and the command works: what has a journal is in the new records"
    (root := project / "with space").mkdir()
    for name in (".mlnb", "pyproject.toml"):
        (project / name).rename(root / name)
    file = root / ".mlnb" / "records.db"
    file.write_bytes(damage(file.read_bytes()))
    recorder = Recorder(f"sqlite:///{file}", root / ".mlnb" / "runs", root)
    run_id = recorder.start_run("planes", {"seed": 7})
    recorder.close()
    done = mlnb(root)
    assert done.returncode and "Traceback" not in done.stderr
    assert f"the records in {file} are damaged (" in done.stderr and ".mlnb/runs/*/records.jsonl" in done.stderr
    command = done.stderr.partition("move them aside with: ")[2].partition("; mlnb runs")[0]
    subprocess.run(command, shell=True, check=True)
    assert ids(root) == [run_id] and (root / ".mlnb" / "damaged-records.db" / "records.db").exists()
