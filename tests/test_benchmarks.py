"""Benchmarks speak one form, and a bar that does not hold ends the program with 1. Nothing is timed here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
FORM = ["name", "ours", "peer", "ratio", "bar", "holds"]
PROGRAMS = ("profiles", "training")
FAKE = """
import sys
row = {"name": "sorting", "ours": 2.0, "peer": 3.0, "ratio": 1.5, "bar": BAR, "holds": 1.5 >= BAR}
print([row] if "--json" not in sys.argv else __import__("json").dumps([row]))
sys.exit(not row["holds"])
"""


def program(name):
    "A benchmark as a module; it may import what lies beside it"
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_prints_a_list_and_ends_with_1_where_a_bar_does_not_hold(name, holds, code, monkeypatch, capsys):
    module = program(name)
    row = {"name": "made up", "ours": 1.0, "peer": 3.0, "ratio": 3.0, "bar": 2.0, "holds": holds}
    monkeypatch.setattr(module, "measure", lambda *a, **k: row)
    for other in ("served", "equality", "growth"):  # of profiles
        monkeypatch.setattr(
            module, other, lambda *a, other=other, **k: row if other == "served" else [row], raising=False
        )
    monkeypatch.setattr(sys, "argv", [name, "--json"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    printed = json.loads(capsys.readouterr().out)
    assert ended.value.code == code and printed and all(list(r) == FORM for r in printed)


def test_what_is_measured_has_that_form(monkeypatch):
    profiles, training = program("profiles"), program("training")
    small = profiles.continuous(2000, columns=2)
    assert list(profiles.measure("small", small, 0.0, 1)) == FORM
    assert all(list(row) == FORM and row["holds"] for row in profiles.equality([small])[:2])
    assert list(profiles.served(profiles.flights()[:500])) == FORM and profiles.batches(1000)["memory"] > 0
    random = np.random.default_rng(0)
    columns = {"carrier": random.choice(["UA", "B6"], 5000), "wind": random.normal(size=5000)}
    monkeypatch.setattr(
        training, "rows", lambda: ("few", columns, random.integers(0, 2, 5000), ("carrier",), ("wind",))
    )
    monkeypatch.setattr(training, "ROUNDS", 1)
    assert list(training.measure(training.torch.device("cpu"), epochs=1)) == FORM


@pytest.mark.parametrize(("bar", "code"), [(1.0, 0), (2.0, 1)])
def test_all_of_them_become_one_page(bar, code, tmp_path):
    for name in ("run.py", "report.py"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "needs.py").write_text("def everything(): pass")
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(FAKE.replace("BAR", str(bar)))
    done = subprocess.run([sys.executable, tmp_path / "run.py", "--json"], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert [list(row) for row in json.loads(done.stdout)] == [FORM, FORM]
    page = (tmp_path / "README.md").read_text()
    assert f"| two: sorting | 2 | 3 | 1.5x | {bar:.3g} | {'yes' if code == 0 else '**no**'} |" in page


@pytest.fixture
def serving(monkeypatch):
    "The benchmark of the service; its servers import each other from its folder"
    monkeypatch.syspath_prepend(FOLDER)
    return program("serving")


needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="wrk makes the load")


@needs_wrk
def test_a_server_is_proved_loaded_and_ended(serving, tmp_path):
    serving.Mlp.random(0).save(tmp_path / "products/v1/model")
    bench = serving.Bench(tmp_path, seconds=1, rounds=1, requests=0)
    with serving.running(serving.servers.fastapi(tmp_path)) as peer:
        (found,) = serving.take_turns(bench, serving.one_row(bench, peer))
        assert found["requests"] > 0 and found["errors"] == 0 and found["cpu"] > 0 and found["p50"] <= found["p99"]
        assert peer.memory() > 1
    assert not peer.process.is_running()


@needs_wrk
def test_a_server_that_answers_wrongly_is_not_timed(serving, tmp_path):
    serving.Mlp.random(0).save(tmp_path / "products/v1/model")
    with serving.running(serving.servers.fastapi(tmp_path)) as peer:
        shutil.rmtree(tmp_path / "products")
        serving.Mlp.random(1).save(tmp_path / "products/v1/model")
        with pytest.raises(SystemExit, match=r"FastAPI answers .* the model gives"):
            serving.one_row(serving.Bench(tmp_path, 1, 1, 0), peer)


@needs_wrk
def test_answers_that_are_errors_are_not_timed(serving, tmp_path):
    serving.Mlp.random(0).save(tmp_path / "products/v1/model")
    (bodies := tmp_path / "bodies").write_text('{"customer": "c1"}\n')
    with serving.running(serving.servers.fastapi(tmp_path)) as peer, pytest.raises(SystemExit, match="with errors"):
        serving.Load(peer, "/predict", bodies).run(1)


def test_a_server_that_cannot_start_says_why(serving, tmp_path, capsys):
    broken = serving.Server(
        "broken", [sys.executable, "-c", "raise SystemExit('no model here')"], tmp_path, serving.servers.environment()
    )
    with pytest.raises(SystemExit) as ended, serving.running(broken):
        pass
    assert ended.value.code == 2 and "broken did not become ready; it said:\nno model here" in capsys.readouterr().err


@pytest.fixture
def bare(tmp_path):
    "Runs a benchmark of a checkout in which nothing was made or installed but the packages"
    copy = shutil.copytree(FOLDER, tmp_path / "benchmarks")

    def run(name, *arguments, **variables):
        command = [sys.executable, copy / f"{name}.py", "--json", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | variables)

    return run


def cannot_run(done, *words):
    "It has printed nothing that could be taken for a result, and says what to do"
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_benchmark_that_cannot_run_says_what_to_install(bare, tmp_path):
    cannot_run(bare("serving", PATH=str(tmp_path)), "wrk is not installed", "apt-get install wrk")
    cannot_run(bare("drift"), "products/flights/features.parquet is not there", "mlnb run")
    cannot_run(bare("run", PATH=str(tmp_path)), "run.py cannot run: wrk is not installed")
    assert (tmp_path / "benchmarks/README.md").read_text() == (FOLDER / "README.md").read_text()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/wrk").write_text("#!/bin/sh\n")
    (tmp_path / "bin/wrk").chmod(0o755)
    for peer in ("litserve", "mlserver"):
        done = bare("serving", "--only", peer, PATH=str(tmp_path / "bin"))
        cannot_run(done, f"{peer} is not installed", "make bench-peers")
    (tmp_path / "products/flights").mkdir(parents=True)
    (tmp_path / "products/flights/features.parquet").touch()
    cannot_run(bare("drift"), "evidently is not installed", "make bench-peers")


@pytest.mark.parametrize(
    "name", ["drift", "notebooks", "outcomes", "pipelines", "profiles", "run", "serving", "training"]
)
def test_a_package_that_is_missing_is_named(bare, tmp_path, name):
    needs = tmp_path / "benchmarks/needs.py"
    needs.write_text(needs.read_text().replace('"whylogs"', '"no_such_package"'))
    cannot_run(
        bare(name), f"{name}.py cannot run: no_such_package is not installed", "pip install -r requirements.lock"
    )


HOLES = ["print([])", "import sys; print('[]'); sys.exit(2)", "raise ValueError", "print('[1')"]


@pytest.mark.parametrize("program", HOLES)
def test_a_page_has_no_silent_holes(program, tmp_path):
    for name in ("run.py", "report.py"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "needs.py").write_text((FOLDER / "needs.py").read_text() + "\n\ndef everything(): pass\n")
    (tmp_path / "one.py").write_text(FAKE.replace("BAR", "1.0"))
    (tmp_path / "two.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "run.py", "--json"], capture_output=True, text=True)
    assert done.returncode == 2 and "two.py ended with" in done.stderr and done.stdout == ""
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(("ours", "holds"), [(1.0, True), (1.3, True), (1.4, False)])
def test_a_bar_from_above(serving, ours, holds):
    for row in (serving.no_more_than("made up", ours, 1.0, 1.3), serving.at_most("made up", ours, 1.3, "ms")):
        assert list(row) == FORM and row["holds"] is holds


@needs_wrk
@pytest.mark.long
def test_the_service_is_measured_with_everything_on(tmp_path):
    short = ["--seconds", "1", "--rounds", "1", "--requests", "2000"]
    parts = ["--only", "memory", "--only", "swap"]
    done = subprocess.run(
        [sys.executable, FOLDER / "serving.py", "--json", *short, *parts], capture_output=True, text=True
    )
    rows = json.loads(done.stdout)
    assert [list(row) for row in rows] == 3 * [FORM] and done.returncode == (not all(r["holds"] for r in rows))
    assert rows[-2]["name"].endswith("errors") and rows[-2]["ours"] == 0
