"""Files of earlier releases: what release 0.1 wrote (tests/data/make_release.py) is read by the code of today."""

import ast
import asyncio
import copy
import importlib
import inspect
import json
import pickle
import pkgutil
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import click
import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from mlnb.cli.main import COMMANDS, cli
from mlnb.data import hourly_profiles
from mlnb.data.point_in_time import floor_to_interval
from mlnb.data.profiles import Profile
from mlnb.data.snapshot_store import SnapshotStore
from mlnb.models.bundle import Bundle
from mlnb.models.metrics import Cost, scores_by_group
from mlnb.models.watcher import read_releases, releases_folder, verify_servable
from mlnb.monitoring.channels import load_channels
from mlnb.monitoring.drift_thresholds import DriftThresholds
from mlnb.monitoring.rules import load_rules
from mlnb.notebooks.renamed_code import NameTable, rename_code
from mlnb.project.errors import BundleError
from mlnb.project.renames import RenamedWarning, renames
from mlnb.project.settings import load_settings
from mlnb.serving.app import create_app
from mlnb.serving.labels import LabelLog
from mlnb.serving.log_profiles import LogProfileStore, profiles_url, update_profiles
from mlnb.serving.predictions import PredictionLog
from mlnb.serving.routing import Routing, RoutingFile

pytestmark = pytest.mark.usefixtures("forget_projects")

RELEASE = Path(__file__).parent / "data" / "release-0.1"
FOLLOWED = {"serve_from": "models:/toy"}


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory):
    "The packages that the bundles name, importable from a copy"
    folder = tmp_path_factory.mktemp("packages")
    for project, package in (("service", "shipped"), ("scorecard", "scorecard")):
        shutil.copytree(RELEASE / project / package, folder / package)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def project(request, tmp_path, monkeypatch):
    "A copy of the project named by the parameter, by default of `service`; it is the working folder"
    root = tmp_path / getattr(request, "param", "service")
    shutil.copytree(RELEASE / root.name, root)
    for file in root.glob(".mlnb/**/*.json"):
        file.write_text(file.read_text().replace(f"/project/{root.name}", str(root)))
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def settings(project):
    "Of the copy, in which profiles and versions are moved to where this machine and folder have them"
    settings = load_settings(project)
    moves = {
        ".mlnb/storage/profiles/*": Path(profiles_url(settings)),
        ".mlnb/versions/*": releases_folder(replace(settings, **FOLLOWED)),
    }
    for pattern, target in moves.items():
        (folder,) = project.glob(pattern)
        folder.rename(target)
        for file in target.glob("*.json"):
            file.write_text(file.read_text().replace(str(folder), str(target)))
    return settings


def mlnb(*words: str, code: int = 0) -> str:
    "What a command prints in the working folder, run in this process"
    done = CliRunner(env={"COLUMNS": "160"}).invoke(cli, words)
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.stdout


def document(*words: str, code: int = 0):
    return json.loads(mlnb(*words, "--json", code=code))


projects = lambda *names: pytest.mark.parametrize("project", names, indirect=True)


# --- bundles ----------------------------------------------------------------------------------------------------------


@projects("service", "scorecard")
def test_a_bundle_answers_its_samples_bit_for_bit(project):
    assert Bundle.load(project / "products/bundle").self_test() == 12


def test_reference_and_null_of_a_bundle(project):
    bundle = Bundle.load(project / "products/bundle")
    null = DriftThresholds.from_bytes(bundle.drift)
    assert null.families["distance"] == "input" and len(null.ordinary) > 1
    jfk = Profile.from_bytes((bundle.folder / "segments/origin=JFK/reference.profile").read_bytes())
    assert 0 < jfk.rows < Profile.from_bytes(bundle.reference).rows == 420


def upgrade_features(project: Path, monkeypatch, change=lambda code: code):
    "Rewrite the code that the bundle of `service` names, in the copy, and import it from there"
    file = project / "shipped/features.py"
    code = rename_code(file.read_text(), NameTable.forwards())
    assert "PointInTimeFeatures([FeatureView(" in code and "Context(" not in code
    file.write_text(change(code))
    for name in [name for name in sys.modules if name.partition(".")[0] == "shipped"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(project))


def test_a_bundle_whose_code_was_upgraded_is_served(project, monkeypatch):
    upgrade_features(project, monkeypatch)
    bundle = Bundle.load(project / "products/bundle")
    assert bundle.self_test() == 12 and bundle.context_features.__class__.__name__ == "PointInTimeFeatures"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("// 3600 % 24", "// 3600 % 12"),  # a number
        ("np.log1p(request", "np.log(request"),  # a name that is not mlnb's
        ("Events(", "Columns("),  # another name of mlnb
        ('"time"]).window(', '"time"]).other('),  # a member
    ],
)
def test_a_bundle_whose_code_was_changed_is_refused(project, monkeypatch, old, new):
    upgrade_features(
        project, monkeypatch, lambda code: code.replace("import PointIn", "import Columns, PointIn").replace(old, new)
    )
    with pytest.raises(BundleError, match="was trained with another shipped"):
        Bundle.load(project / "products/bundle")


def test_an_upgraded_bundle_whose_answers_differ_is_refused(project, monkeypatch):
    upgrade_features(project, monkeypatch)
    monkeypatch.setattr(Bundle, "self_test", Mock(side_effect=BundleError("fails its self-test")))
    with pytest.raises(BundleError, match="fails its self-test"):
        Bundle.load(project / "products/bundle")


def answered(project: Path, *rows: dict) -> list[dict]:
    settings, bundle = load_settings(project), Bundle.load(project / "products/bundle")
    log = PredictionLog.of(settings)
    app = create_app(bundle, SnapshotStore.of(settings), log, settings.snapshot_max_age_minutes)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post("/predict", json=rows)

    answer = asyncio.run(ask())
    log.close()
    assert answer.status_code == 200, answer.text
    return answer.json()


@projects("service", "scorecard")
def test_a_bundle_is_served(project):
    samples = Bundle.load(project / "products/bundle").samples
    answers = answered(project, *samples["requests"])
    assert [answer["probability"] for answer in answers] == samples["outputs"]["probability"]
    assert [answer["decision"] for answer in answers] == samples["outputs"]["decision"]


# --- log, profiles and outcomes ---------------------------------------------------------------------------------------


def test_predictions_are_read_and_compacted(project, settings):
    before = document("predictions", "--limit", "1000", code=1)  # a line is damaged
    assert len(before) == 12 + 4 + 10 + 4
    assert {(row["model_version"], row["arm"]) for row in before} == {
        ("v1", "champion"),
        ("v1", "batch"),
        ("v2", "challenger"),
    }
    row = next(row for row in before if row["entity"] == "B6/1/JFK/2013-07-01T05:30:00Z")
    assert (row["time"], row["distance"] > 0, row["hour"]) == ("2013-07-31T05:05:00Z", True, 5)
    done = document("compact", code=1)
    assert (done["files"], done["rows"], done["damaged"]) == (2, 14, 1)
    assert document("predictions", "--limit", "1000", code=1) == before


def test_profiles_of_hours_are_taken_as_they_are(project, settings):
    assert update_profiles(settings, lines=False) == []
    store = LogProfileStore(profiles_url(settings))
    assert store.hours() == ["2013-07-31T05", "2013-08-01T05", "2013-08-01T06"]
    assert store.merged("2013-07").rows == 6 and store.merged(segment=("origin", "JFK")).rows == 10
    archives = [
        hourly_profiles.from_bytes(file.read_bytes()) for file in Path(profiles_url(settings)).rglob("2013-07.hourly")
    ]
    assert sum(archive.rows.sum() for archive in archives) == 2 * 6  # all, and by origin
    assert store.hourly("2013-07").rows.sum() == 6


def test_drift_of_the_log(project, settings):
    drift = document("drift", "log", "--by", "month")
    assert [window["rows"] for window in drift["windows"]] == [6, 24]
    assert "columns" in mlnb("drift", "log:2013-08-01", "--html", "drift.html", "--metrics", "drift.prom")


def test_outcomes_are_read_and_gathered(project, settings):
    status = document("labels", "status")
    found = document("performance", "--as-of", "2013-08-10")["overall"]
    assert (found["decisions"], found["known"]) == (20, 16)
    from_file, from_service = mlnb("labels", "show", "B6/4/EWR/2013-07-01T07:00:00Z").splitlines()  # a part, and a line
    assert from_file.startswith("0  observed at 2013-08-04") and from_file.endswith("from y.csv")
    assert from_service.startswith("1  observed at 2013-08-04") and from_service.endswith("from service")
    mlnb("compact", code=1)
    assert document("labels", "status")["outcomes"] == status["outcomes"]
    assert document("performance", "--as-of", "2013-08-10")["overall"] == found


def test_outcomes_are_accepted_at_their_old_path(project, settings):
    app = create_app(
        Bundle.load(project / "products/bundle"), None, None, labels=LabelLog(settings.path(settings.labels))
    )

    async def send(path: str):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post(path, json={"entity": "a", "value": True})

    old, new = (asyncio.run(send(path)) for path in ("/outcomes", renames()["routes"]["/outcomes"]))
    assert old.status_code == new.status_code == 200 and old.json() == new.json() == {"written": 1}
    assert old.headers["link"] == '<labels>; rel="successor-version"' and "link" not in new.headers


# --- records ----------------------------------------------------------------------------------------------------------


def test_runs(project):
    newest, oldest = document("runs")
    assert (newest["status"], oldest["status"], newest["changed"]) == ("failed", "succeeded", {"seed": [0, 1]})
    shown = mlnb("runs", "show", "bbbb02")
    assert "Task register failed in cell 4: KeyError: 'gone'" in shown and "auc" in shown
    assert "seed" in mlnb("runs", "compare")


def test_alerts(project):
    listed = document("alerts", "list")
    assert {(alert["rule"], alert["state"]) for alert in listed} == {("age", "firing"), ("pipeline", "acknowledged")}
    acknowledged = next(alert["id"] for alert in listed if alert["state"] == "acknowledged")
    shown = mlnb("alerts", "show", str(acknowledged))
    assert "acknowledged by ada: on it" in shown and "HOOK is not set" in shown and "file: firing, sent" in shown
    assert mlnb("alerts", "resolve", str(acknowledged)).startswith(f"Alert {acknowledged} is resolved")


# --- releases ---------------------------------------------------------------------------------------------------------


def test_releases_and_routing(project, settings):
    settings = replace(settings, **FOLLOWED)
    releases = read_releases(releases_folder(settings))
    assert releases.problem is None and (releases.champion.number, releases.challenger.number) == (1, 2)
    champion = verify_servable(releases.champion.folder)
    assert (champion.version, verify_servable(releases.challenger.folder, champion).version) == ("v1", "v2")
    assert RoutingFile(settings).read() == (Routing(25, True), "request")


# --- projects ---------------------------------------------------------------------------------------------------------


@projects("planes")
def test_tasks_that_ran_need_not_run_again(project):
    assert {task["name"]: task["state"] for task in document("plan")["tasks"]} == dict.fromkeys(
        ("first", "second", "other"), "current"
    )


@projects("flight-delays")
def test_a_project_is_planned_and_its_settings_are_read(project):
    states = {task["name"]: task["state"] for task in document("plan")["tasks"]}
    assert len(states) == 8 and states["ingest"] == "outdated" and set(states.values()) <= {"outdated", "waiting"}
    settings = load_settings(project)
    assert (
        settings.cost_positive,
        settings.cost_false_negative,
        settings.snapshot_max_age_minutes,
        settings.max_queued_requests,
    ) == (1.0, 3.0, 90, 32)
    assert (
        settings.request_timeout_seconds,
        settings.log_on_failure,
        settings.log_retention_days,
        settings.keys_required,
    ) == (5, "serve", 400, False)
    assert (settings.labels, settings.model_cache, settings.base_image) == (".mlnb/outcomes", ".mlnb/versions", "cpu")
    production = load_settings(project, "production")
    assert (production.labels, production.cost_false_negative, production.keys_required) == (
        "/project/outcomes",
        4.0,
        True,
    )


@projects("flight-delays")
def test_rules_and_channels_are_read(project):
    settings = load_settings(project)
    rules = {rule.name: rule for rule in load_rules(settings)}
    assert (rules["costs"].max_deviation, rules["up"].max_error_rate, rules["up"].min_requests) == (50.0, 0.02, 100)
    assert (rules["age"].snapshot_minutes, rules["age"].label_minutes) == (60, 2880)
    assert {name: channel.quiet_hours for name, channel in load_channels(settings).items()} == {
        "ops": "22:00-07:00",
        "file": "00:00-05:00",
    }


def variables(project: Path) -> dict[str, str]:
    "Those of its job"
    lines = (project / ".github/workflows/monitor.yml").read_text().splitlines()
    pairs = (line.strip().partition(": ") for line in lines if line.strip().startswith("MLNB_"))
    return {name: value.strip('"') for name, _, value in pairs}


@projects("flight-delays")
def test_variables_are_read(project, monkeypatch):
    for name, value in variables(project).items():
        monkeypatch.setenv(name, value)
    settings = load_settings(project)
    assert (settings.labels, settings.model_cache, settings.keys_required) == (
        "/project/outcomes",
        "/project/versions",
        True,
    )


def imported(notebook: Path):
    "The names that the cells of a notebook import from mlnb, as (module, name)"
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mlnb":
                yield from ((node.module, alias.name) for alias in node.names)


@projects("flight-delays")
def test_what_notebooks_import_is_there(project):
    every = {
        pair
        for notebook in (*project.glob("nbs/*.ipynb"), *project.glob("alerts/*.ipynb"))
        for pair in imported(notebook)
    }
    assert {
        ("mlnb.monitoring", "evidence"),
        ("mlnb.models.bundle", "write_bundle"),
        ("mlnb.data.context", "Context"),
    } <= every
    for module, name in every:
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"


@projects("flight-delays")
def test_modules_of_a_project_work_with_old_names(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flight_delays"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(RenamedWarning, match="'mlnb.data.context' is called 'mlnb.data.point_in_time'"):
        sys.modules.pop("mlnb.data.context", None)
        names = ("context", "evaluate", "register", "train")
        context, evaluate, register, _ = (importlib.import_module(f"flight_delays.{name}") for name in names)
    assert evaluate.by is scores_by_group and context.quarter is floor_to_interval
    decided = np.array(["2013-07-01T05:07"], "datetime64[s]")
    with pytest.warns(RenamedWarning, match="PointInTimeFeatures.moment is called 'as_of'"):
        assert str(register.context_features.moment(decided)[0]) == "2013-07-01T05:00:00"


def test_a_star_import_has_old_and_new_names():
    names: dict = {}
    sys.modules.pop("mlnb.data.context", None)
    with pytest.warns(RenamedWarning, match=r"mlnb\.data\.context"):
        exec("from mlnb.data.context import *", names)
    assert names["quarter"] is names["floor_to_interval"] is floor_to_interval and "Events" in names


def test_members_and_keywords_work_by_their_old_names():
    with pytest.warns(RenamedWarning, match="argument 'missed' of mlnb.models.metrics.Cost is called 'false_negative'"):
        cost = Cost(1.0, missed=4.0)
    with pytest.warns(RenamedWarning, match="Cost.missed is called 'false_negative'"):
        assert cost.missed == 4.0
    with pytest.raises(TypeError, match="unexpected keyword argument 'mised'"):
        Cost(mised=4.0)
    with pytest.raises(AttributeError, match="'Cost' object has no attribute 'mised'"):
        cost.mised
    assert copy.deepcopy(cost) == pickle.loads(pickle.dumps(cost)) == cost


def test_what_the_tables_name_is_there():
    tables = renames()
    for module, names in ({new: {} for new in tables["modules"].values()} | tables["names"]).items():
        places = [name.rpartition(".")[::2] for name in names.values()]
        assert [name for home, name in places if not hasattr(importlib.import_module(home or module), name)] == [], (
            module
        )
    for kind, where, names in [
        (k, where, names) for k in ("members", "keywords") for where, names in tables[k].items()
    ]:
        target = pkgutil.resolve_name(where)
        attributes = {
            *dir(target),
            *getattr(target, "__annotations__", ()),
            *re.findall(r"self\.(\w+)", inspect.getsource(target)),
        }
        there = inspect.signature(target).parameters if kind == "keywords" else attributes
        assert [name for name in names.values() if name not in there] == [], f"{kind} of {where}"


# --- commands ---------------------------------------------------------------------------------------------------------


def test_old_commands_and_options_work_with_one_warning_each(tmp_path):
    words = ["outcomes", "add", "labels.csv", "--outcome", "late", "--outcome=late"]
    done = subprocess.run([sys.executable, "-m", "mlnb.cli.main", *words], cwd=tmp_path, capture_output=True, text=True)
    first, second, *_ = done.stderr.splitlines()
    assert first == "Warning: command 'mlnb outcomes' is called 'mlnb labels' now; `mlnb upgrade` rewrites a project"
    assert (
        second
        == "Warning: option '--outcome' of mlnb labels add is called '--label' now; `mlnb upgrade` rewrites a project"
    )
    assert done.stderr.count("Warning") == 2 and "no project" in done.stderr


def commands(command=cli, path: str = "mlnb"):
    "Every command, by its name"
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(None):
            yield from commands(command.get_command(None, name), f"{path} {name}")


def test_old_options_are_in_no_help_and_new_ones_are():
    found = {path: {name for option in command.params for name in option.opts} for path, command in commands()}
    for path, options in renames()["options"].items():
        assert set(options.values()) <= found[path] and not options.keys() & found[path], path
    assert set(renames()["commands"].values()) <= set(COMMANDS) and not renames()["commands"].keys() & set(COMMANDS)
