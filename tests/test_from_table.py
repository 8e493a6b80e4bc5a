"""`mlnb new NAME --from TABLE`: what is inferred, what is refused, and projects that run."""

import ast
import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from waiting import free_port, wait_until_ready

from mlnb.cli.new import new
from mlnb.data.table_inference import infer_table
from mlnb.data.table_project import project_from_table
from mlnb.data.table_reader import read_table
from mlnb.project.errors import ContractError, MlnbError

ROWS = 400
HOSTILE = [
    "class", "a b", "größe €", 'quo"te\'s', "new\nline", "{{x}}", "<<x>>", "%> <%", "`code`", "# %% code", "import os",
    "12", "time", "decision_time", "probability",
]  # fmt: skip


def customers(rows=ROWS, seed=0) -> pd.DataFrame:
    "Binary, with every kind of column"
    rng = np.random.default_rng(seed)
    spent, age = rng.gamma(2, 50, rows).round(2), rng.integers(18, 80, rows).astype(float)
    age[rng.random(rows) < 0.1] = np.nan
    churned = rng.random(rows) < 1 / (1 + np.exp(spent / 40 - 2))
    words = np.array(["late", "broken", "fine", "great", "refund", "thanks"])
    return pd.DataFrame({
        "customer_id": [f"C-{i:05}" for i in range(rows)],
        "country": rng.choice(["DE", "FR", "PL"], rows),
        "age": age,
        "spent": spent,
        "is_member": rng.random(rows) < 0.5,
        "note": [" ".join(rng.choice(words, 6)) for _ in range(rows)],
        "signed_up": pd.Timestamp("2025-01-01") + pd.to_timedelta(np.sort(rng.integers(0, 300 * 24, rows)), "h"),
        "refund": np.where(churned, spent / 2, np.nan),
        "channel": "web",
        "churned": churned,
    })  # fmt: skip


def leaks_of(frame, target="churned", **options):
    return infer_table(frame, target, **options)[0].left_out


def test_what_a_table_shows_is_inferred():
    table, rows = infer_table(customers(), "churned", entity="customer_id")
    assert table.problem.kind == "binary" and table.time == "signed_up" and len(rows) == ROWS
    assert {c.field: c.type for c in table.columns} == {
        "customer_id": "category", "country": "category", "age": "number", "spent": "number", "is_member": "boolean",
        "note": "text", "signed_up": "time",
    }  # fmt: skip
    assert {c.field for c in table.columns if c.nullable} == {"age"}
    assert set(table.left_out) == {"refund", "channel"} and "AUC" in table.left_out["refund"]


def test_the_names_of_columns_do_not_matter():
    frame = customers()
    names = {name: f"c{number}" for number, name in enumerate(frame.columns)}
    renamed, _ = infer_table(frame.rename(columns=names), names["churned"])
    plain, _ = infer_table(frame, "churned")
    assert [(names[c.name], c.type) for c in plain.columns] == [(c.name, c.type) for c in renamed.columns]
    assert [names[name] for name in plain.left_out] == list(renamed.left_out)


def test_leaks_are_found_by_what_they_hold():
    frame, rng = customers(3000), np.random.default_rng(1)
    churned = frame["churned"].to_numpy()
    left = frame["signed_up"] + pd.to_timedelta(rng.integers(1, 90, len(frame)), "D")
    leaky = frame.drop(columns="refund").assign(
        score_copy=churned + rng.normal(0, 0.05, len(frame)),  # alone almost perfect
        left_at=left.where(churned),  # a time after the decision, and only if it happened
        reviewed=left,  # a time after the decision
        reason=np.where(churned, rng.choice(["price", "service"], len(frame)), None),
        closed=np.where(churned & (rng.random(len(frame)) < 0.5), 1, 0),
    )  # fmt: skip
    found = leaks_of(leaky, time="signed_up")
    assert {"score_copy", "left_at", "reviewed", "reason"} <= set(found) and not {"age", "spent", "note"} & set(found)
    assert "AUC" in found["score_copy"] and "after 'signed_up'" in found["reviewed"]
    assert "score_copy" not in leaks_of(leaky, time="signed_up", keep=["score_copy"])


def test_a_regression_loses_the_copy_of_its_target():
    rng = np.random.default_rng(0)
    size, rooms = rng.uniform(30, 200, 2000), rng.integers(1, 7, 2000)
    price = 3000 * size + 20_000 * rooms + rng.normal(0, 60_000, 2000)
    homes = pd.DataFrame({"size": size, "rooms": rooms, "tax": price * 0.035, "price": price})
    table, _ = infer_table(homes, "price")
    assert table.problem.kind == "regression" and set(table.left_out) == {"tax"}


def test_the_index_of_a_parquet_file_is_a_column(tmp_path):
    frame = customers(120).set_index("customer_id")
    frame.to_parquet(tmp_path / "indexed.parquet")
    project, table = project_from_table("shop", str(tmp_path / "indexed.parquet"), "churned", tmp_path, print)
    assert "identifies rows" in table.left_out["customer_id"]
    contract = {}
    exec((project / "shop/contract.py").read_text(), contract)
    assert "customer_id" in contract["read"](str(tmp_path / "indexed.parquet"))


def table_of(**columns):
    return pd.DataFrame({"x": np.arange(100) % 7 + 0.5, "y": np.arange(100) % 2} | columns)


@pytest.mark.parametrize(("frame", "target", "message"), [
    (table_of(), "z", "the table has no column 'z'"),
    (table_of(y=1), "y", "has the value '1' in every row"),
    (table_of().head(3), "y", "3 rows with a value of 'y'"),
    (table_of(y=np.nan), "y", "is missing in every row"),
    (table_of(y=[np.inf, *range(99)]), "y", "is infinite in 1 rows, such as row 1"),
    (table_of(y=["1", "2"] * 49 + ["n/a", "3"]), "y", "such as 'n/a' in row 99"),
    (table_of(y=pd.date_range("2026-01-01", periods=100)), "y", "holds times"),
    (table_of(y=[[1]] * 100), "y", "holds list values"),
    (table_of(y=["a"] * 97 + ["b"] * 3), "y", "fewer than 10 rows of some classes"),
    (table_of(y=[f"v{i}" for i in range(100)]), "y", "fewer than 10 rows"),
    (table_of(x=np.nan), "y", "no column is left to learn 'y' from: x is missing in every row"),
    (pd.DataFrame(np.zeros((100, 5000))).set_axis([f"c{i}" for i in range(5000)], axis=1).assign(y=[0, 1] * 50),
     "y", "5,001 columns, the limit is 1,000"),
])  # fmt: skip
def test_a_table_that_cannot_be_learned_from(frame, target, message):
    with pytest.raises(ContractError) as error:
        infer_table(frame, target)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.csv", b"", "is empty"),
    ("header.csv", b"a,b\n", "has no rows"),
    ("twice.csv", b"a,a,y\n1,2,0\n", "more than one column 'a'"),
    ("broken.parquet", b"PAR1 no", "cannot be read as parquet"),
    ("table.xlsx", b"PK", "mlnb reads .parquet, .csv"),
    ("wrong.sql", b"select * from nowhere", "the query cannot be run"),
    ("binary.csv", bytes(range(256)) * 4, "cannot be read as csv"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MlnbError) as error:
        project_from_table("shop", str(tmp_path / name), "y", tmp_path, lambda line: None)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_options_that_do_not_fit():
    run = lambda *words: CliRunner().invoke(new, ["shop", *words])
    for words, message in (
        (("--from", "a.csv"), "--target NAME"),
        (("--from", "a.csv", "--from", "b.csv", "--target", "y"), "one table"),
        (("--target", "y"), "name it with --from"),
        (("--from", "a.csv", "--target", "y", "--template", "minimal"), "exclude each other"),
        (("--from", "nothing.csv", "--target", "y"), "there is no file nothing.csv"),
    ):
        assert message in str(run(*words).exception)


def test_columns_of_any_type(tmp_path):
    frame = pd.DataFrame({
        "price": [Decimal(i) / 4 for i in range(120)],
        "day": pd.date_range("2026-01-01", periods=120).date,
        "tags": [[1, 2]] * 120,
        "level": pd.Categorical(["low", "high", None] * 40),
        "paid": pd.array([True, False, None] * 40, "boolean"),
        "wait": pd.to_timedelta(np.arange(120) % 9, "h"),
        "y": np.arange(120) % 2,
    })  # fmt: skip
    frame.to_parquet(tmp_path / "mixed.parquet")
    table, _ = infer_table(read_table(tmp_path / "mixed.parquet"), "y")
    types = {c.field: c.type for c in table.columns}
    assert types | {"price": "number"} == types and types["day"] == "time" and types["level"] == "category"
    assert types["paid"] == "number" and "holds ndarray values" in table.left_out["tags"]


def test_names_cannot_become_code(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({name: rng.normal(0, 1, 200) for name in HOSTILE})
    frame["ta\"r'g\net"] = np.where(rng.random(200) < 0.5, "y's \"<<\n", "{{no}}")
    frame.to_parquet(tmp_path / "it's.parquet")
    source, quiet = str(tmp_path / "it's.parquet"), lambda line: None
    project, table = project_from_table("shop", source, "ta\"r'g\net", tmp_path, quiet)
    assert len(table.columns) == len(HOSTILE) and all(c.field.isidentifier() for c in table.columns)
    for notebook in (project / "nbs").glob("*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "code":
                ast.parse("".join(cell["source"]))
    contract = {}
    exec((project / "shop/contract.py").read_text(), contract)
    rows = contract["tidy"](contract["read"](str(tmp_path / "it's.parquet")))
    assert len(rows) == 200 and set(rows[contract["TARGET"]]) == {0, 1}


def variables(project):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {k: v for k, v in os.environ.items() if k != "MLNB_ROOT"} | {"PATH": path, "PYTHONPATH": str(project)}


def command(project, *words):
    done = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True, env=variables(project))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(project):
    "The answers of the service to the requests that stand in the README"
    words = re.findall(r"(/predict|/labels) .*? -d '(.*)'$", (project / "README.md").read_text(), re.MULTILINE)
    port = free_port()
    serve = [sys.executable, "-m", "mlnb.cli.main", "serve", "--no-bento", "--port", str(port)]
    with subprocess.Popen(serve, cwd=project, env=variables(project), stdout=subprocess.DEVNULL) as service:
        try:
            url = wait_until_ready(service, f"http://127.0.0.1:{port}")
            sent = [httpx.post(f"{url}{path}", content=body, timeout=60) for path, body in words]
            return [answer.json() for answer in sent]
        finally:
            service.terminate()


def table_for(kind):
    frame, rng = customers(600), np.random.default_rng(2)
    if kind == "binary":
        return frame, ("--entity", "customer_id", "--time", "signed_up")
    frame = frame.drop(columns=["signed_up", "churned", "refund", "customer_id"])
    if kind == "regression":
        return frame.assign(target=frame["spent"] * 2 + frame["age"].fillna(40) + rng.normal(0, 20, len(frame))), ()
    noisy = frame["spent"] + rng.normal(0, 30, len(frame))
    levels = pd.cut(noisy, [-1000, 60, 120, 1e6], labels=["low", "mid", "high"])
    return frame.assign(target=levels.astype(str)).drop(columns="note"), ()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_project_runs_is_tested_and_answers(tmp_path, kind):
    frame, options = table_for(kind)
    target = "churned" if kind == "binary" else "target"
    frame.to_csv(tmp_path / "customers.csv", index=False)
    words = ("mlnb.cli.main", "new", "shop", "--from", "customers.csv", "--target", target, *options)
    command(tmp_path, "-m", *words)
    project = tmp_path / "shop"
    command(project, "-m", "mlnb.cli.main", "run")
    assert "Nothing to do" in command(project, "-m", "mlnb.cli.main", "run")
    command(project, "-m", "mlnb.cli.main", "check")
    command(project, "-m", "pytest", "-q")
    scores = list(json.loads((project / "products/scores.json").read_text()).values())
    metric = "rmse" if kind == "regression" else "log_loss"
    assert scores[-1][metric] < scores[0][metric]
    answer, labels = ask(project)
    assert {"binary": "probability"}.get(kind, "prediction") in answer
    assert labels == {"written": 1}
    drift = command(project, "-m", "mlnb.cli.main", "drift", "products/table.parquet", "--column", "spent")
    assert "spent" in drift
