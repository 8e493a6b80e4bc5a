"""The notebook of an alert, executed in a real kernel, with all of the data and with none of it."""

import datetime as dt
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from mlnb.data.profiles import Profile
from mlnb.monitoring import alert_notebook, alert_opener
from mlnb.monitoring.alert_opener import build_notebook, notebook_parameters, open_alert
from mlnb.monitoring.alerts import AlertStore, deployment_name
from mlnb.monitoring.rules import RULE_KINDS, evaluate, from_table, load_rules
from mlnb.project.settings import load_settings
from mlnb.records import Records
from mlnb.serving.labels import Label, LabelLog
from mlnb.serving.predictions import Prediction, PredictionLog


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project in which one airport sends its distances in kilometres since yesterday"
    root = tmp_path_factory.mktemp("evidence")
    (root / "pyproject.toml").write_text(
        '[tool.mlnb]\ncost_false_negative = 3.0\n[tool.mlnb.alerts.inputs]\nkind = "drift"\nlevel = "moderate"\n'
    )
    settings, log, rng = load_settings(root), PredictionLog.of(load_settings(root)), np.random.default_rng(0)
    reference = {"distance": rng.gamma(4, 250, 9000), "origin": np.array(["EWR", "JFK", "LGA"] * 3000)}
    Profile.of(reference).write(root / "products/bundle/reference.profile")
    for day in ("2013-07-03", "2013-07-04"):
        times, miles = (
            [f"{day}T{i * 24 // 1200:02}:{i % 60:02}:00Z" for i in range(1200)],
            rng.gamma(4, 250, 1200).tolist(),
        )
        far = [m * (1.9 if i % 3 == 1 and day == "2013-07-04" else 1) for i, m in enumerate(miles)]
        inputs = [{"origin": ["EWR", "JFK", "LGA"][i % 3]} for i in range(1200)]
        output = ("v1", "champion", times[0], 1.0, {"probability": 0.1, "decision": False})
        log.append(
            [Prediction(f"{day}{i}", "k", t, t, *output, inputs[i], {"distance": far[i]}) for i, t in enumerate(times)]
        )
    log.close()
    then = dt.datetime(2013, 7, 5, tzinfo=dt.UTC)
    LabelLog.of(settings).append([Label("k", 1.0, then, then, "service")])
    return settings


@pytest.fixture(scope="module")
def alert(project):
    "The alert that a check makes of it"
    alerts = AlertStore(Records(f"sqlite:///{project.root}/records.db"), deployment_name(project))
    alerts.record([evaluate(rule, project, alerts.records) for rule in load_rules(project)], ["log"])
    (found,) = alerts.select()
    alerts.close()
    assert found["subject"] == "distance"
    return found


def outputs(path):
    notebook = json.loads(path.read_text())
    found = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert not [o for o in found if o["output_type"] == "error"]
    assert notebook["metadata"]["kernelspec"]["name"] == "mlnb" and "papermill" not in notebook["metadata"]
    text = "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in found)
    return text, sum("image/png" in o.get("data", {}) for o in found), notebook


def test_the_evidence_is_in_the_notebook(project, alert):
    others = {p.name for p in (project.root / "alerts").glob("*")}
    path, new, failed = open_alert(alert, project)
    assert (path, new, failed) == (project.root / "alerts" / f"{alert['id']}.ipynb", True, None)
    text, drawings, _ = outputs(path)
    assert "origin=JFK" in text and "(1200, " in text and drawings == 2
    assert {p.name for p in path.parent.iterdir()} - others == {path.name}
    path.write_text("mine")
    assert open_alert(alert, project) == (path, False, None) and path.read_text() == "mine"
    another, new, _ = open_alert(alert, project, again=True)
    assert new and another.name == f"{alert['id']}-2.ipynb" and path.read_text() == "mine"
    episode, *_ = open_alert(alert | {"episode": 2}, project)
    assert episode.name == f"{alert['id']}-episode2.ipynb"


@pytest.fixture
def airport(tmp_path):
    "A project in which one airport, whose distances are others, sends longer ones; a shadow answers as well"
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    settings, log, rng = load_settings(tmp_path), PredictionLog.of(load_settings(tmp_path)), np.random.default_rng(0)
    origin = np.array(["JFK", "LGA", "EWR"] * 3000)
    known = {"origin": origin, "far": np.where(origin == "JFK", 30.0, 10.0) + rng.normal(0, 2, 9000)}
    Profile.of(known).write(tmp_path / "products/bundle/reference.profile")
    jfk = {name: values[origin == "JFK"] for name, values in known.items()}
    Profile.of(jfk).write(tmp_path / "products/bundle/segments/origin=JFK/reference.profile")
    for i in range(1200):
        at, far = f"2013-07-04T{i // 50:02}:{i % 60:02}:00Z", (33.0 if i % 3 == 0 else 10.0) + rng.normal(0, 2)
        for arm in ("champion", "shadow"):
            raw = {"origin": str(origin[i])}
            log.append(
                [
                    Prediction(
                        f"{i}{arm}",
                        "k",
                        at,
                        at,
                        "v1",
                        arm,
                        at,
                        1.0,
                        {"probability": 0.1, "decision": False},
                        raw,
                        {"far": far if arm == "champion" else 0.0},
                    )
                ]
            )
    log.close()
    return settings


def test_the_evidence_is_what_the_rule_judged(airport):
    rule = from_table(RULE_KINDS, "alerts", "r", {"kind": "drift", "segment": "origin=JFK", "columns": ["far"]})
    (finding,) = evaluate(rule, airport, None).findings
    alert, reference = finding.details, alert_notebook.load_reference(airport, "origin=JFK")
    requests = alert_notebook.load_requests(alert, airport)
    assert set(requests["arm"]) == {"champion"} and len(requests) == 400
    assert alert_notebook.compute_drift(requests, reference)["psi"]["far"] == pytest.approx(finding.value)
    days = alert_notebook.drift_history(alert, airport, "far", reference)
    assert days["psi"].tolist() == [pytest.approx(finding.value)] and days["rows"].tolist() == [400]
    assert alert["statistic"] == "psi"


def test_a_limit_is_drawn_where_it_is_one_of_psi(alert):
    of_statistic = lambda name: notebook_parameters(alert | {"details": alert["details"] | {"statistic": name}})[
        "alert"
    ]
    assert of_statistic("psi")["psi_limit"] == 0.1 and "psi_limit" not in of_statistic("ks")


def test_the_bins_are_those_of_the_drift():
    rng = np.random.default_rng(0)
    usual = np.where(rng.random(9000) < 0.4, 5.0, rng.uniform(0, 10, 9000))
    origin, values = np.array(["JFK", "LGA"] * 1500), usual[:3000].copy()
    wrong = (values == 5.0) & (origin == "JFK")
    values[wrong] = 4.9
    requests, reference = pd.DataFrame({"x": values, "origin": origin}), Profile.of({"x": usual})
    whole = alert_notebook.compute_drift(requests, reference)["psi"]["x"]
    best = alert_notebook.worst_segments(requests, reference, "x").iloc[0]
    assert best["segment"] == "origin=JFK" and best["psi_without"] + best["explains"] == pytest.approx(whole, rel=1e-3)
    assert set(alert_notebook.affected_requests(requests, reference, "x")["x"]).isdisjoint({5.0})


def test_an_alert_of_the_same_number_has_its_own_notebook(tmp_path, alert):
    (tmp_path / "pyproject.toml").write_text('[tool.mlnb]\n[tool.mlnb.env.production]\nrecords = "sqlite:///.mlnb/production.db"\n')
    alert = alert | {"kind": "freshness", "details": {}}
    places = {}
    for env in (None, "production"):
        settings = load_settings(tmp_path, env)
        mine = alert | {"project": deployment_name(settings), "words": f"the trouble of {env}"}
        places[env], new, failed = open_alert(mine, settings)
        assert new and failed is None and f"the trouble of {env}" in places[env].read_text()
        assert open_alert(mine, settings) == (places[env], False, None)
    anew, new, _ = open_alert(
        mine | {"first_seen": alert["first_seen"] + dt.timedelta(days=9)}, settings
    )  # the store was replaced
    assert new and [p.name for p in (*places.values(), anew)] == [
        f"{alert['id']}{more}.ipynb" for more in ("", "-2", "-3")
    ]


def test_a_score_comes_with_its_days(project, alert):
    details = {"metric": "cost_per_1000", "since": "2013-07-03T00:00:00", "until": "2013-07-05T00:00:00"}
    path, *_ = open_alert(alert | {"id": 78, "kind": "performance", "details": details}, project)
    text, drawings, notebook = outputs(path)
    assert "log_loss expected" in text and "2013-07-03" in text and drawings == 3
    assert any('"metric": "cost_per_1000"' in "".join(c["source"]) for c in notebook["cells"])


def test_two_open_it_at_once(project, alert):
    with ThreadPoolExecutor(2) as pool:
        opened = [pool.submit(open_alert, alert | {"id": 77}, project) for _ in range(2)]
    assert {one.result()[0].name for one in opened} == {"77.ipynb"} and not (
        project.root / "alerts/77-2.ipynb"
    ).exists()
    outputs(project.root / "alerts/77.ipynb")


@pytest.mark.parametrize("kind", list(RULE_KINDS))
def test_everything_is_gone(tmp_path, alert, kind):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    details = {"url": "http://127.0.0.1:9", "pipeline": "p", "run": "20130101T000000-aaaaaa"}
    lost = alert | {"kind": kind, "details": details if kind in ("service", "runs", "freshness") else alert["details"]}
    path, _, failed = open_alert(lost, load_settings(tmp_path))
    assert failed is None
    text, drawings, _ = outputs(path)
    assert "No requests: " in text and "No reference: the project has no bundle" in text and drawings == 0


def test_kinds_with_their_data(project, alert):
    records = Records(project.url(project.records))
    run = records.start_run(project.name, {})
    records.put_task(run, "train", status="failed", error="KeyError: 'delay'")
    records.end_run(run, "failed")
    records.close()
    for kind, expected in {"service": "does not answer", "freshness": "2013-07-04", "runs": "KeyError"}.items():
        details = {"url": "http://127.0.0.1:9", "pipeline": project.name, "run": run}
        path, _, failed = open_alert(alert | {"id": 100 + len(kind), "kind": kind, "details": details}, project)
        text, drawings, _ = outputs(path)
        assert failed is None and expected in text and drawings == (0 if kind == "runs" else 1)


def test_a_kernel_that_cannot_start_leaves_the_notebook(tmp_path, alert, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.mlnb]\n")
    broken = build_notebook(alert)
    broken["cells"][2]["source"] = "import no_such_module"
    monkeypatch.setattr(alert_opener, "build_notebook", lambda alert: broken)
    path, new, failed = open_alert(alert, load_settings(tmp_path))
    assert new and "no_such_module" in failed and "no_such_module" in path.read_text() and str(path) in failed


@pytest.mark.parametrize("kind", ["drift", "runs"])
def test_odd_names_make_a_notebook(project, alert, kind):
    name = "a'\"\\\n{x}`|<b>"
    details = alert["details"] | {"column": name, "segment": "{s}='\"", "version": "{v}", "pipeline": name, "run": name}
    odd = alert | {
        "id": 200,
        "kind": kind,
        "subject": name,
        "words": f"{name} moved",
        "rule": "{y}",
        "details": details,
    }
    path, _, failed = open_alert(odd, project)
    assert failed is None and "<b>" not in json.loads(path.read_text())["cells"][0]["source"]
