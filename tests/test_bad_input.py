"""What users get wrong, through the real command and the real service: one clear sentence, a non-zero exit, nothing
lost."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import nbformat
import pandas as pd
import pytest
import toy_project
import warm_cli
from pipeline_project import FIRST, make, notebook
from waiting import free_port, wait_until_ready

from mlnb.project.errors import ServingError
from mlnb.serving.server import check_port

PROGRAM = (sys.executable, "-P", "-c", "from mlnb.cli.main import main; main()")
KEPT = {"MLNB_TRACK_RUNS": "false", "MLNB_RUNTIME_DIR": os.environ["MLNB_RUNTIME_DIR"]}
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith(("MLNB_", "BENTOML_", "PROMETHEUS_"))} | KEPT
DECLARED = "upstream = None\nproduct = None"


def mlnb(root, *words, **variables):
    "`mlnb WORDS` in the folder `root`"
    return warm_cli.run(words, cwd=root, env=PLAIN | variables, safe_path=True)


def said(done) -> str:
    "What a command wrote to standard error, its line breaks as blanks"
    return " ".join(done.stderr.split())


def contents(folder: Path) -> dict[str, str]:
    "The digest of every file below a folder"
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def refused(root, words, *expected, code=1, **variables):
    "Assert that the command ends with one sentence that holds every expected text, and changes no product or notebook"
    kept = {name: contents(root / name) for name in ("out", "nbs", "products")}
    done = mlnb(root, *words.split(), **variables)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert [text for text in expected if text not in said(done)] == [], done.stderr
    assert {name: contents(root / name) for name in kept} == kept
    return done


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A project whose pipeline has run once; copy it, do not change it"
    root = make(tmp_path_factory.mktemp("done") / "project")
    ran = mlnb(root, "run")
    assert ran.returncode == 0, ran.stderr
    return root


@pytest.fixture
def project(done, tmp_path):
    "A copy of a project whose products are all there"
    return shutil.copytree(done, tmp_path / "project")


@pytest.fixture
def model(toy, tmp_path):
    "A copy of a project with a model bundle and a context"
    return shutil.copytree(toy, tmp_path / "model")


def edit(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# Notebooks and their parameters


def test_no_parameters_cell(project):
    notebook(project / "nbs/other.ipynb", None, "1 + 1")
    refused(project, "run", "task 'other'", "other.ipynb has no parameters cell", "tag one code cell 'parameters'")
    assert "has no parameters cell" in mlnb(project, "check").stdout


def test_a_parameter_that_no_notebook_declares(project):
    refused(
        project, "run --param nn=1", "neither env.yaml nor any notebook declares a parameter 'nn' (did you mean 'n'?)"
    )
    edit(project / "pipeline.yaml", 'params: {n: "{{n}}"}', "params: {n: 1, m: 2}")
    refused(project, "run", "task 'first'", "no parameter 'm'")


@pytest.mark.parametrize("value", ["three", "1.5", "[1]", "true"])
def test_a_wrong_type(project, value):
    refused(project, f"run --param n={value}", "parameter 'n' has value", "write a value of type int, such as 1")
    (project / "env.yaml").write_text(f"n: {value}\n")
    refused(project, "run", "parameter 'n' has value", "write a value of type int, such as 1")


# pipeline.yaml


def test_a_circle(project):
    notebook(project / "nbs/first.ipynb", 'upstream = ["second"]\nproduct = None\nn = 1', FIRST)
    refused(
        project, "run", "the tasks depend on each other in a circle: first -> second -> first; remove one upstream name"
    )


def test_an_unknown_upstream_task(project):
    notebook(project / "nbs/second.ipynb", 'upstream = ["frist"]\nproduct = None\nextra = 1', "1")
    refused(
        project, "run", "task 'second' names the upstream task 'frist', which does not exist (did you mean 'first'?)"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs a list of tasks; write for example: tasks:"),
        ("tasks:\n", "needs a list of tasks"),
        ("task:\n- source: nbs/first.ipynb\n", "needs a list of tasks"),
        (
            "tasks:\n\t- source: nbs/first.ipynb\n",
            "pipeline.yaml is not valid YAML in line 2: a tab; indent with spaces",
        ),
        ("tasks:\n- source: nbs/frist.ipynb\n  product: out/first.ipynb\n", "there is no notebook"),
        (
            "tasks:\n- source: nbs/first.R\n  product: out/first.ipynb\n",
            "a task is a notebook, or a .py file with cells, write for example: source:",
        ),
        ("tasks:\n- source: nbs/first.ipynb\n", "'product' is missing; write for example: product:"),
        (
            "tasks:\n- source: nbs/first.ipynb\n  prodct: out/first.ipynb\n",
            "unknown key 'prodct' (did you mean 'product'?)",
        ),
        (
            "tasks:\n- {source: nbs/other.ipynb, product: {nb: out/a.ipynb, n: {{n}}}}\n",
            'write a placeholder in quotes: "{{name}}"',
        ),
        (
            "tasks:\n- {source: nbs/other.ipynb, product: out/a.ipynb, params: {w: {0: 1.0}}}\n",
            "pipeline.yaml: key 0 has type int",
        ),
        (
            "tasks:\n- {source: nbs/other.ipynb, product: out/a.ipynb, params: {w: !!set {a}}}\n",
            "value {'a'} has type set; write a text",
        ),
    ],
)
def test_a_pipeline_that_is_none(project, text, says):
    (project / "pipeline.yaml").write_text(text)
    refused(project, "run", says)


def test_a_missing_pipeline_and_a_broken_env(project):
    (project / "env.yaml").write_text("n: [1\n")
    refused(project, "run", "env.yaml is not valid YAML in line 2")
    (project / "env.yaml").write_text("n: 1\n7: x\n")
    refused(project, "run", "env.yaml: key 7 has type int", "write it in quotes")
    (project / "env.yaml").write_text("")
    refused(project, "run", "'{{n}}' names 'n', which env.yaml does not define")
    (project / "pipeline.yaml").unlink()
    refused(project, "run", "there is no", "pipeline.yaml; write it, or add it with: mlnb init")


@pytest.mark.parametrize("text", ["", '{"cells": [', "[]", "print('no notebook')"])
def test_a_file_that_is_no_notebook(project, text):
    (project / "nbs/other.ipynb").write_text(text)
    refused(project, "run", "task 'other'", "other.ipynb is not a notebook")


# Tasks that fail: earlier products stay, the executed copy opens


def executed_copy(done) -> nbformat.NotebookNode:
    "The executed copy that a message names, read and checked as a notebook"
    path = Path(said(done).rpartition("the executed copy is ")[2].split(" ")[0])
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    return found


def test_a_notebook_that_raises(project):
    body = 'from pathlib import Path\nPath(product["data"]).write_text("bad")\nraise ValueError("no rows")'
    notebook(project / "nbs/first.ipynb", f"{DECLARED}\nn = 1", body)
    done = refused(
        project, "run", "Task first failed", "nbs/first.ipynb, cell [3]: ValueError: no rows", "the executed copy is"
    )
    outputs = [o for cell in executed_copy(done)["cells"] for o in cell.get("outputs", [])]
    assert any(o["output_type"] == "error" and o["evalue"] == "no rows" for o in outputs)


def test_a_task_that_writes_only_half_its_products(project):
    body = 'from pathlib import Path\nPath(product["data"]).write_text("half")'
    notebook(project / "nbs/first.ipynb", f"{DECLARED}\nn = 1", body)
    refused(project, "run", "task 'first' ended without writing folder", "earlier products are unchanged")
    assert not list((project / "out").glob(".stage*"))


CONTRACT = """
    import pandas as pd
    import pandera.pandas as pa
    from mlnb.data.contracts import validate
    rows = pd.DataFrame({"miles": [100.0, -5.0, -6.0], "month": [1, 2, 13]})
    columns = {"miles": pa.Column(float, pa.Check.ge(0)), "month": pa.Column(int, pa.Check.isin(range(1, 13)))}
    validate(rows, pa.DataFrameSchema(columns,
             name="flights"), "rejected/flights.parquet")
"""


def test_data_that_break_their_contract(project):
    notebook(project / "nbs/other.ipynb", DECLARED, CONTRACT)
    says = (
        "ContractError: flights, 3 rows, breaks its contract",
        "column 'miles'",
        "fails in 2 rows",
        "column 'month'",
        "fails in 1 row",
    )
    refused(project, "run other", *says, "The 2 offending rows are in rejected/flights.parquet")
    assert pd.read_parquet(project / "rejected/flights.parquet")["month"].tolist() == [2, 13]


TRACKED = """
    from mlnb.models.registry import Tracking
    from mlnb.project.settings import load_settings
    settings = load_settings()
    with Tracking(settings.url(settings.tracking)).run("planes"):
        pass
"""


def test_no_such_mlflow_server(project):
    notebook(project / "nbs/other.ipynb", DECLARED, TRACKED)
    url = f"http://127.0.0.1:{free_port()}"
    says = f"TrackingError: setting 'tracking' has value '{url}', which does not answer"
    refused(project, "run other", says, "start it with mlflow server", MLNB_TRACKING=url)


# Settings and words of the command line


@pytest.mark.parametrize("command", ["run", "check", "build", "serve", "drift log"])
def test_an_unknown_setting(project, command):
    with (project / "pyproject.toml").open("a") as f:
        f.write('recrods = "x"\n')
    refused(project, command, "unknown setting 'recrods' (did you mean 'records'?); known are package,", code=2)


def test_an_unknown_setting_is_found_by_the_doctor(project):
    with (project / "pyproject.toml").open("a") as f:
        f.write('recrods = "x"\n')
    done = mlnb(project, "doctor", "--json")
    findings = {f["item"]: f for f in json.loads(done.stdout)["findings"]}
    assert (
        done.returncode == 1
        and "unknown setting 'recrods'" in findings["Settings"]["detail"]
        and "Project" not in findings
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('port = "3000"', "setting 'port' has value '3000'; write port = 3000"),
        ("port = 70000", "setting 'port' has value 70000; write port = 3000, a free TCP port from 1 to 65535"),
        ("port = ", "pyproject.toml is not valid TOML: Invalid value (at line 6"),
        (
            'records = "postgres://localhost:1/x"',
            "setting 'records' has value 'postgres://localhost:1/x', which cannot be opened",
        ),
    ],
)
def test_a_setting_with_a_wrong_value(project, line, says):
    with (project / "pyproject.toml").open("a") as f:
        f.write(line + "\n")
    refused(project, "runs", says, code=2)


TABLES = {"table.csv": "a,b\n1,2\n", "semicolons.csv": "a;b\n1;2\n"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("rn", 2, "no command 'rn' (did you mean 'run'?)"),
        ("run --parm n=3", 2, "No such option '--parm'. (Did you mean"),
        ("run --param n", 1, "is not of the form name=value"),
        ("run sceond", 1, "there is no task 'sceond' (did you mean 'second'?)"),
        ("--env prod run", 2, "no environment 'prod'; [tool.mlnb.env.NAME] tables: none"),
        ("new", 2, "Missing argument 'NAME'"),
        ("new 2fast", 2, "'2fast' is not a valid name of a Python package; choose a new word"),
        ("new planes", 2, "exists already; choose another name, or remove it"),
        ("build", 1, "it has no bundle.json; make one with: mlnb run"),
        ("serve", 1, "no Bento has been built yet; run: mlnb run, then mlnb build"),
        ("serve --port 99999", 2, "99999 is not in the range"),
        ("drift", 2, "Missing argument 'CURRENT'"),
        ("drift log", 1, "has no rows; serve the model first with: mlnb serve"),
        ("drift july.parquet", 1, "there is no file 'july.parquet'; write one of: bundle, log,"),
        ("drift empty.parquet", 1, "empty.parquet is empty"),
        ("drift empty.csv", 1, "empty.csv is empty"),
        ("drift heads.csv --reference heads.csv", 1, "heads.csv has no rows"),
        ("drift nbs", 1, "is not a model bundle with a reference: it has no reference.profile"),
        ("drift semicolons.csv", 1, "has one column, 'a;b'; separate columns with commas"),
        (
            "drift table.csv --reference table.csv --html env.yaml/drift.html",
            2,
            "env.yaml/drift.html cannot be written",
        ),
    ],
)
def test_a_slip_of_the_first_hour(project, words, code, says):
    for name, text in {"empty.parquet": "", "empty.csv": "", "heads.csv": "a,b\n", **TABLES}.items():
        (project / name).write_text(text)
    refused(project, words, says, code=code)


@pytest.mark.parametrize("command", ["run", "check", "build", "serve", "drift log"])
def test_the_wrong_folder(tmp_path, command):
    refused(tmp_path, command, f"no project at or above {tmp_path}", "create one with: mlnb new NAME", code=2)


def test_ctrl_c(project):
    body = "from pathlib import Path\nPath('started').touch()\nimport time\ntime.sleep(300)"
    notebook(project / "nbs/first.ipynb", f"{DECLARED}\nn = 1", body)
    kept = contents(project / "out")
    process = subprocess.Popen(
        [*PROGRAM, "run"], cwd=project, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (project / "started").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert contents(project / "out") == kept


# Bundles and ports


def damage(bundle: Path, how: str):
    "Spoil one file of a bundle"
    if how == "manifest":
        (bundle / "bundle.json").write_text('{"format"')
    elif how == "missing":
        (bundle / "samples.json").unlink()
    else:
        weights = bundle / "model/weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("manifest", "bundle.json"),
        ("missing", "samples.json is missing"),
        ("bit", "model/weights.safetensors has changed since it was written"),
    ],
)
def test_a_corrupt_bundle(model, how, says):
    damage(model / "products/bundle", how)
    for command in ("build", "serve --development"):
        refused(model, command, says)


def test_a_port_in_use(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(
            model,
            f"serve --development --port {port}",
            f"port {port} of 127.0.0.1 cannot be used",
            "in use",
            "mlnb serve --port",
        )


def test_a_port_that_is_none():
    with pytest.raises(ServingError, match="port 70000 is no TCP port; choose one from 1 to 65535"):
        check_port("127.0.0.1", 70000)


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine(model, host):
    says = f"host '{host}' is no address of this machine"
    refused(model, f"serve --development --host {host}", says, "write --host 127.0.0.1 for this machine")


# Requests to the running service


@pytest.fixture(scope="module")
def service(toy, tmp_path_factory):
    "A client of `mlnb serve`, and a request that is right"
    root = shutil.copytree(toy, tmp_path_factory.mktemp("service") / "project")
    port = free_port()
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--development", "--port", str(port)], cwd=root, env=PLAIN | {"PYTHONPATH": str(root)}
    )
    try:
        with httpx.Client(base_url=wait_until_ready(process, f"http://127.0.0.1:{port}")) as client:
            yield client, toy_project.example(root)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def ask(service, **changed):
    "The answer to a request with fields replaced by raw JSON, or left out by None"
    client, row = service
    fields = {k: v for k, v in ({k: json.dumps(v) for k, v in row.items()} | changed).items() if v is not None}
    body = "{" + ", ".join(f'"{k}": {v}' for k, v in fields.items()) + "}"
    return client.post("/predict", content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("origin", None),
        ("tailnum", '"N1"'),
        ("distance", '"1400"'),
        ("flight", "1.5"),
        ("departure", '"tomorrow"'),
        ("distance", "null"),
        ("distance", "NaN"),
        ("distance", "Infinity"),
        ("distance", "-Infinity"),
        ("distance", "1e999"),
    ],
)
def test_a_wrong_field_is_400_and_named(service, field, value):
    answer = ask(service, **{field: value})
    assert answer.status_code == 400 and field in answer.json()["error"]
    (problem,) = answer.json()["fields"]
    assert problem["field"] == field and problem["problem"] and "Traceback" not in answer.text
    assert ask(service).status_code == 200


@pytest.mark.parametrize("place", ["nbs", "nbs/other.ipynb", "planes", "pyproject.toml", "pipeline.yaml"])
def test_a_product_that_would_replace_what_a_person_wrote(project, place):
    body = 'from pathlib import Path\nPath(product["data"]).mkdir()'
    notebook(project / "nbs/other.ipynb", DECLARED, body)
    (project / "pipeline.yaml").write_text(
        f"tasks:\n- {{source: nbs/other.ipynb, product: {{nb: out/other.ipynb, data: {place}}}}}\n"
    )
    refused(project, "run", "task 'other': product 'data' would replace", "which is or contains")


def test_a_product_inside_another(project):
    edit(project / "pipeline.yaml", "product: out/other.ipynb", "product: out/folder/other.ipynb")
    refused(project, "run", "task 'other': product", "lies inside", "a product of task 'first'")
