"""`mlnb upgrade`: a project of release 0.1 has the names of today afterwards, and nothing else has changed."""

import importlib
import json
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_compatibility import commands, variables

from mlnb.cli.main import cli
from mlnb.monitoring.notify import load_channels
from mlnb.monitoring.rules import load_rules
from mlnb.notebooks.renamed_code import NameTable, rename_cells, rename_code
from mlnb.project.renames import RenamedWarning, renames
from mlnb.project.settings import load_settings
from mlnb.project.upgrade import upgrade_commands, upgrade_metrics, upgrade_settings

pytestmark = pytest.mark.usefixtures("forget_projects")

RELEASE = Path(__file__).parent / "data" / "release-0.1"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "flight-delays"
    shutil.copytree(RELEASE / "flight-delays", root)
    monkeypatch.chdir(root)
    return root


def upgrade(*words: str, code: int = 0, answer: str | None = None) -> str:
    done = CliRunner().invoke(cli, ["upgrade", *words], input=answer)
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.output


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


# --- a project --------------------------------------------------------------------------------------------------------


def test_a_project_is_upgraded_once_and_then_loads_without_a_warning(project, monkeypatch):
    before = contents(project)
    diff = upgrade("--check", code=1)
    assert (
        "-cost_missed = 3.0\n" in diff
        and "+cost_false_negative = 3.0\n" in diff
        and "+++ prometheus/alerts.yml" in diff
    )
    assert "Apply these changes to 18 files?" in upgrade(answer="n\n", code=1) and contents(project) == before
    assert "Upgraded 18 files." in upgrade("--yes")
    after = contents(project)
    assert upgrade("--check") == upgrade("--yes") == "Nothing to upgrade.\n" and contents(project) == after
    assert (project / "pyproject.toml").read_text().count("#") == before["pyproject.toml"].count(b"#")

    monkeypatch.syspath_prepend(str(project))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flight_delays"]:
        monkeypatch.delitem(sys.modules, name)
    for name, value in variables(project).items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RenamedWarning)
        for env in (None, "production"):
            settings = load_settings(project, env)
            assert (settings.labels, settings.cost_false_negative, settings.log_retention_days) == (
                "/project/outcomes",
                3.0,
                400,
            )
        assert {rule.name for rule in load_rules(settings)} == {"costs", "up", "age"} and len(
            load_channels(settings)
        ) == 2
        for name in ("ingest", "validate", "explore", "features", "train", "evaluate", "register", "context"):
            importlib.import_module(f"flight_delays.{name}")
        features = sys.modules["flight_delays.features"]
        assert type(features.context_features).__name__ == "PointInTimeFeatures"


def test_notebooks_and_modules_stay_in_step(project):
    subprocess.run([sys.executable, "-m", "mlnb.cli.main", "upgrade", "--yes"], check=True, capture_output=True)
    before = contents(project)
    export = shutil.which("nbdev-export", path=str(Path(sys.executable).parent))
    subprocess.run([export], check=True, capture_output=True)
    changed = {name for name, content in contents(project).items() if content != before.get(name)}
    assert not {name for name in changed if name.endswith(".py")}


def test_commands_of_ci_are_those_of_today(project):
    upgrade("--yes")
    known = dict(commands())
    lines = (project / ".github/workflows/monitor.yml").read_text().splitlines()
    calls = [line.partition(" mlnb ")[2].split() for line in lines if " mlnb " in line]
    assert len(calls) == 14
    for words in calls:
        command = known.get(f"mlnb {' '.join(words[:2])}") or known[f"mlnb {words[0]}"]
        options = {name for option in command.params for name in option.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, words


def test_what_is_not_a_file_of_the_project_is_left_alone(project):
    old = "MLNB_OUTCOMES=1\n"
    for name in (
        ".venv/lib/a.sh",
        ".mlnb/a.sh",
        "products/a.sh",
        "node_modules/a.sh",
        "CHANGELOG.md",
        "data.csv",
        "ignored.sh",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(old)
    outside = project.parent / "outside.sh"
    outside.write_text(old)
    (project / "link.sh").symlink_to(outside)
    (project / "latin.sh").write_bytes(b"# caf\xe9\n" + old.encode())
    (project / "broken.py").write_text("from mlnb.data.context import (\n")
    script = project / "deploy"
    script.write_bytes(b"#!/bin/sh\r\nmlnb serve --plain\r\n")
    script.chmod(0o750)
    subprocess.run(["git", "init", "-q"], check=True)
    (project / ".gitignore").write_text("ignored.sh\nproducts\n")
    before = contents(project)
    upgrade("--yes")
    changed = {
        name for name, content in contents(project).items() if content != before[name] and not name.startswith(".git/")
    }
    assert script.read_bytes() == b"#!/bin/sh\r\nmlnb serve --no-bento\r\n" and script.stat().st_mode & 0o777 == 0o750
    assert "deploy" in changed and not {
        name for name in changed if name.endswith((".sh", ".csv", "CHANGELOG.md", "broken.py"))
    }
    assert outside.read_text() == old and (project / "link.sh").is_symlink()


def test_a_setting_with_both_names_is_changed_by_hand(project):
    file = project / "pyproject.toml"
    file.write_text(file.read_text().replace('outcomes = ".mlnb/outcomes"', 'outcomes = "a"\nlabels = "b"'))
    shown = upgrade("--yes", code=1)
    assert (
        "Change by hand: pyproject.toml: setting 'outcomes' is there by its old and its new name; remove the old one"
        in shown
    )
    assert 'outcomes = "a"' in file.read_text()
    assert "Nothing else to upgrade." in upgrade("--yes", code=1)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'tool.mlnb.outcomes = "x"',
        '[tool]\nmlnb.outcomes = "x"',
        '[tool.mlnb]\n"outcomes" = "x"\nenv.production.outcomes = "y"',
        '[tool.mlnb]\nenv = {production = {outcomes = "y, requests = 1", cost_missed = 2.0}}',
        '[tool.mlnb]\nalerts.up = {kind = "service", requests = 100, error_share = 0.1}',
        '[tool.mlnb.alerts]\nup.kind = "service"\nup.requests = 100',
        '[tool.mlnb.alerts.up]\nkind = "service"\n[tool.mlnb.env.production.alerts.up]\nrequests = 3 # outcomes = 1',
        '[tool.mlnb]\n  outcomes="x"\n[[tool.other]]\noutcomes = "z"',
    ],
)
def test_forms_of_a_setting(text):
    new = upgrade_settings(text)
    assert new != text and upgrade_settings(new) == new
    document = json.dumps(tomllib.loads(new)["tool"]["mlnb"])
    assert not any(f'"{old}":' in document for old in ("outcomes", "requests", "error_share", "cost_missed"))


@pytest.mark.parametrize(
    "text",
    [
        '[project]\nname = "x"\n[tool.other]\noutcomes = 1\n[tool.other.mlnb]\noutcomes = 1',
        '[tool.mlnb]\nmetrics = [\n  "outcomes = 1",\n  "cost_missed",\n]',
        '[tool.x]\ntext = """\n[tool.mlnb]\noutcomes = 1\n"""\noutcomes = 2',
        '[tool.mlnb.alerts.up]\nkind = "drift"\nrequests = 1',  # a setting of rules of another kind
        '[tool.mlnb.alerts.outcomes]\nkind = "drift"\n[tool.mlnb.env.outcomes]\nport = 1',  # names of a user
        "# outcomes = 1\n[tool.mlnb]\n# cost_missed = 1",
    ],
)
def test_what_is_no_setting_of_mlnb_stays(text):
    assert upgrade_settings(text) == text


# --- code -------------------------------------------------------------------------------------------------------------


FORWARDS, BACKWARDS = NameTable.forwards(), NameTable.backwards()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import mlnb.data.context as c\nc.quarter", "import mlnb.data.point_in_time as c\nc.floor_to_interval"),
        (
            "import mlnb.data.context\nmlnb.data.context.View",
            "import mlnb.data.point_in_time\nmlnb.data.point_in_time.FeatureView",
        ),
        (
            "from mlnb.data import context\ncontext.View",
            "from mlnb.data import point_in_time\npoint_in_time.FeatureView",
        ),
        (
            "from mlnb.data.context import (\n    View,  # é\n    Events,\n)",
            "from mlnb.data.point_in_time import (\n    FeatureView,  # é\n    Events,\n)",
        ),
        (
            "from mlnb.data.context import quarter as q\nq",
            "from mlnb.data.point_in_time import floor_to_interval as q\nq",
        ),
        (
            "def f():\n    from mlnb.data.context import quarter\n    return quarter",
            "def f():\n    from mlnb.data.point_in_time import floor_to_interval\n    return floor_to_interval",
        ),
        (
            "from mlnb.models.metrics import by\nf'é {by(x):>{by}} by {\"by\"}'",
            "from mlnb.models.metrics import scores_by_group\nf'é {scores_by_group(x):>{scores_by_group}} by {\"by\"}'",
        ),
        (
            "from mlnb.models.metrics import by\nclass A:\n    by = 1\n    def f(self, x: 'by') -> by: return by",
            "from mlnb.models.metrics import scores_by_group\nclass A:\n    by = 1\n"
            "    def f(self, x: 'scores_by_group') -> by: return scores_by_group",
        ),
        (
            "from mlnb.data.context import *\nquarter, Events",
            "from mlnb.data.point_in_time import *\nfloor_to_interval, Events",
        ),
        (
            "from mlnb.data.context import View\nfor s in features.snapshots(x):\n    s.moment, other.moment",
            "from mlnb.data.point_in_time import FeatureView\nfor s in features.snapshots(x):\n    s.as_of, "
            "other.moment",
        ),
        ("patch('mlnb.data.context.quarter')", "patch('mlnb.data.point_in_time.floor_to_interval')"),
        (
            "from mlnb.models.metrics import Cost\nCost(alert=1).missed",
            "from mlnb.models.metrics import Cost\nCost(positive=1).false_negative",
        ),
        (
            "from mlnb.project.settings import load_settings\ns = load_settings()\ns.outcomes",
            "from mlnb.project.settings import load_settings\ns = load_settings()\ns.labels",
        ),
    ],
)
def test_code(old, new):
    assert rename_code(old, FORWARDS) == new
    assert rename_code(new, FORWARDS) == new
    assert rename_code(new, BACKWARDS) == old


@pytest.mark.parametrize(
    "code",
    [
        "by = 1\nquarter = by\noutcomes = quarter",
        "from context import quarter\nfrom .context import View\nimport pandas as pd\npd.context.quarter(minutes=1)",
        "def f(by, *, within): return by.at(within=within)",
        "import mlnb\nx.outcomes, x.moment, x.missed",
        "text = 'from mlnb.data.context import quarter'",
        "not python (",
    ],
)
def test_code_that_is_not_mlnbs_stays(code):
    assert rename_code(code, FORWARDS) == code


@pytest.mark.parametrize(
    "code",
    [
        "from mlnb.models.metrics import by\ndef f(scores_by_group): return by",
        "from mlnb.models.metrics import by\nscores_by_group = 1\nby",
        "from mlnb.models.metrics import by\nfor by in x: by",
        "from mlnb.models.metrics import by\n[by for scores_by_group in x]",
        "from mlnb.models.metrics import by\ndef f():\n    global scores_by_group\n    return scores_by_group, by",
    ],
)
def test_a_name_that_would_mean_something_else_is_kept_by_an_alias(code):
    new = rename_code(code, FORWARDS)
    assert new == code.replace("import by", "import scores_by_group as by") and rename_code(new, BACKWARDS) == code


def test_cells_share_their_imports_and_may_have_magics():
    old = [
        "%matplotlib inline\nfrom mlnb.models.metrics import by",
        "%%time\nx = !ls\nby(x)",
        "%%bash\nby",
        "await by(1)",
        "by?",
    ]
    new = rename_cells(old, FORWARDS)
    assert new[1:] == ["%%time\nx = !ls\nscores_by_group(x)", "%%bash\nby", "await scores_by_group(1)", "by?"]
    assert rename_cells(new, BACKWARDS) == old


def test_every_name_has_one_way_back():
    for old, new in FORWARDS.paths.items():
        assert FORWARDS.rename(new) == new and BACKWARDS.rename(new).rpartition(".")[2] == old.rpartition(".")[2], old


# --- commands and metrics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".venv/bin/mlnb --env production outcomes add x", ".venv/bin/mlnb --env production labels add x"),
        ('run: "mlnb drift log --by day"', 'run: "mlnb drift log --window day"'),
        ("`mlnb serve --plain`, then `--plain`", "`mlnb serve --no-bento`, then `--plain`"),
        ('CMD ["mlnb", "serve", "--plain"]', 'CMD ["mlnb", "serve", "--no-bento"]'),
        ("['mlnb', 'alerts', 'ack', '1', '--by', 'me']", "['mlnb', 'alerts', 'ack', '1', '--user', 'me']"),
        ("mlnb score a b --at 1 | other --at 2", "mlnb score a b --decision-time 1 | other --at 2"),
        ("my-mlnb serve --plain; mlnb.serve --plain", "my-mlnb serve --plain; mlnb.serve --plain"),
        ("mlnb alerts check --by day", "mlnb alerts check --by day"),
        ('mlnb alerts ack 1 --note "--by"', 'mlnb alerts ack 1 --note "--by"'),
    ],
)
def test_commands(old, new):
    assert upgrade_commands(old) == upgrade_commands(new) == new


def test_metrics_of_a_dashboard():
    expression = 'sum(rate(mlnb_beside{job="a", what="shadow_failed"}[5m]))'
    old = json.dumps({"expr": f"{expression} / my_mlnb_rows_total + mlnb_request_seconds_count"})
    new = json.loads(upgrade_metrics(old))["expr"]
    assert (
        new
        == 'sum(rate(mlnb_shadow_predictions_total{job="a",result="failed"}[5m]))'
        " / my_mlnb_rows_total + mlnb_request_duration_seconds_count"
    )


def test_the_page_on_upgrading_lists_every_metric():
    page = (ROOT / "docs/upgrading.md").read_text()
    rows = [f"| `{old}` | `{new}` |" for old, new in renames()["metrics"].items()]
    assert [row for row in rows if row not in page] == []
    settings = [f"| `{old}` | `{new}` |" for old, new in renames()["settings"].items()]
    assert [row for row in settings if row not in page] == []


def test_metrics_have_the_names_that_the_table_gives_them():
    code = "".join(path.read_text() for path in (*(ROOT / "mlnb/serving").glob("*.py"), ROOT / "mlnb/cli/drift.py"))
    for old, new in renames()["metrics"].items():
        name, old_name = (metric.partition("{")[0].removesuffix("_total") for metric in (new, old))
        assert f'"{name}"' in code or f'("{name.removeprefix("mlnb_drift_")}"' in " ".join(code.split()).replace(
            "( ", "("
        ), new
        assert f'"{old_name}"' not in code, old
