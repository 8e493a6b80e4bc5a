"""The whole way of each kind of model: answers of a service, labels from files and requests, performance, alert."""

import csv
import datetime as dt
import json

import httpx
import kinds
import pytest
from test_app import serving
from toy_project import environment
from warm_cli import run

from mlnb.monitoring.alert_notebook import daily_scores
from mlnb.monitoring.rule_base import RuleContext
from mlnb.monitoring.rules_performance import PerformanceRule
from mlnb.project.errors import AlertError
from mlnb.project.settings import load_settings

WRONG = {"binary": "maybe", "multiclass": "nine", "regression": "inf", "custom": "medium"}
RULES = {"binary": ("log_loss", 0.0), "multiclass": ("accuracy", 1.0), "regression": ("mae", 1.0)}
FIGURES = {"binary": 2, "multiclass": 3, "regression": 2, "custom": 0}


def mlnb(project, *words, code=0):
    done = run(words, cwd=project, env=environment(project))
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def label_of(kind, row, answer):
    "The label of a request: near its answer, but not always equal"
    number = int(answer["request_id"][-1], 16)
    if kind == "binary":
        return int(answer["probability"] > 0.3)
    if kind == "multiclass":
        return answer["prediction"] if number else "eight"
    return answer["prediction"] + 30 if kind == "regression" else answer["topic"]


@pytest.fixture(scope="module", params=kinds.KINDS)
def watched(request, tmp_path_factory):
    "A project whose service has answered, with most labels in a file and one sent to the service"
    kind = request.param
    project = kinds.make(tmp_path_factory.mktemp(kind) / "project", kind)
    rows = json.loads((project / "products/bundle/samples.json").read_text())["requests"]
    log = {"MLNB_LABELS": str(project / ".mlnb/outcomes"), "MLNB_LOG_COMPACT_MINUTES": "0"}
    with (
        serving(project, project / ".mlnb/predictions", **log) as (_, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        answers = client.post("/predict", json=rows).json()
        key = {"binary": "customer", "regression": "house"}.get(kind)
        keys = [row[key] if key else answer["request_id"] for row, answer in zip(rows, answers, strict=True)]
        labels = [label_of(kind, row, answer) for row, answer in zip(rows, answers, strict=True)]
        sent = client.post("/labels", json={"entity": keys[0], "value": labels[0]})
        assert sent.status_code == 200, sent.text
        refused = client.post("/labels", json={"entity": keys[0], "value": WRONG[kind]})
        assert refused.status_code == 400 and refused.json()["fields"][0]["field"] == "value"
        example = client.get("/openapi.json").json()["paths"]["/labels"]["post"]["requestBody"]["content"]
        example = example["application/json"]["example"]
        assert client.post("/labels", json=example | {"entity": "nobody"}).status_code == 200
    column = "entity" if key else "request_id"
    with (project / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(column, "value"), *zip(keys[1:], labels[1:], strict=True), (keys[0], WRONG[kind])])
    return project, kind, len(set(keys))


def test_labels_come_from_a_file_and_from_requests(watched):
    project, kind, _ = watched
    added = json.loads(mlnb(project, "labels", "add", "labels.csv", "--json"))
    assert (added["added"], added["rejected"], added["unknown"]) == (11, 1, 0)
    assert WRONG[kind] in added["problem"] and "; write " in added["problem"]
    assert json.loads(mlnb(project, "labels", "add", "labels.csv", "--json"))["added"] == 0
    assert "13 entities have a label" in mlnb(project, "labels", "status")


def test_performance_and_its_page(watched):
    project, kind, decisions = watched
    mlnb(project, "labels", "add", "labels.csv")
    early = mlnb(project, "performance")
    assert "the first closes at" in early
    later = f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=4):%Y-%m-%d}"
    result = json.loads(mlnb(project, "performance", "--as-of", later, "--json"))
    assert result["problem"] == kind and result["overall"]["known"] == result["overall"]["decisions"] == decisions
    assert set(result["overall"]["realised"]) <= set(result["metrics"]) and result["unmatched"] == 1
    shown = mlnb(project, "performance", "--as-of", later, "--html", "performance.html")
    page = (project / "performance.html").read_text()
    assert f"{decisions} decisions" in shown and page.count("<figure>") == FIGURES[kind]
    if kind != "custom":
        assert result["metrics"][result["primary"]]["title"] in shown


def test_a_rule_speaks_of_the_metrics_of_the_model(watched):
    project, kind, _ = watched
    mlnb(project, "labels", "add", "labels.csv")
    later = dt.datetime.now(dt.UTC).replace(tzinfo=None) + dt.timedelta(days=4)
    context = RuleContext(load_settings(project), None, later)
    wrong = PerformanceRule(name="quality", metric="accurasy", worse_than=0.5)
    with pytest.raises(AlertError, match=r"the model has no metric 'accurasy'.*coverage"):
        list(wrong.find(context))
    covered = PerformanceRule(name="labelled", metric="coverage", worse_than=0.9)
    assert list(covered.find(context)) == []
    if kind in RULES:
        metric, limit = RULES[kind]
        (finding,) = PerformanceRule(name="quality", metric=metric, worse_than=limit).find(context)
        assert finding.subject == metric and finding.limit == limit and len(daily_scores({}, context.settings)) == 0


OBJECTIVE = """
import numpy as np


def euros(labels, outputs):
    return 2.0 * np.abs(outputs["prediction"] - labels)
"""


def test_an_objective_of_the_project_is_shown_in_its_unit(watched):
    project, kind, _ = watched
    if kind != "regression":
        pytest.skip("one kind is enough")
    (project / "tiny/costs.py").write_text(OBJECTIVE)
    toml, later = (project / "pyproject.toml").read_text(), f"{dt.datetime.now(dt.UTC).date() + dt.timedelta(days=4)}"
    mlnb(project, "labels", "add", "labels.csv")
    try:
        text = toml.replace("[tool.mlnb]\n", '[tool.mlnb]\nobjective = "tiny.costs.euros"\nobjective_unit = "EUR"\n')
        (project / "pyproject.toml").write_text(text)
        result = json.loads(mlnb(project, "performance", "--as-of", later, "--json"))
        assert result["primary"] == "cost_per_1000" and result["overall"]["realised"]["cost_per_1000"] == 60_000
        assert "cost per 1000 (EUR) 60,000" in mlnb(project, "performance", "--as-of", later)
        (project / "pyproject.toml").write_text(text.replace("costs.euros", "costs.dollars"))
        assert "setting 'objective' needs 'tiny.costs.dollars'" in mlnb(project, "performance", code=2)
    finally:
        (project / "pyproject.toml").write_text(toml)
