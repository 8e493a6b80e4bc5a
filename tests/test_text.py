"""Text from callers, wherever it is shown: on a terminal, in a page, a notebook, a drawing, a message, a metric, a
sheet."""

import csv
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from email import message_from_bytes, policy
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import toy_project
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from mlnb.cli.drift import prometheus_text
from mlnb.cli.main import cli
from mlnb.data.profiles import Profile
from mlnb.monitoring import alert_notebook, alert_opener
from mlnb.monitoring.channels import EmailChannel, Notification, SlackChannel
from mlnb.monitoring.drift import compare
from mlnb.monitoring.drift_page import page
from mlnb.project.errors import MlnbError
from mlnb.project.text import markdown_text, printable
from mlnb.serving.predictions import Prediction, PredictionLog

ACTS = "\x1b\x9b\x07\r\u202e\u2066\u200b\ufeff\u2028\U000e0041"  # on a terminal or a reader
HOSTILE = [
    r"$\foo$", "$$", r"\(x\)", "$_{", "[red]x[/red]", "[/]", "[link=file:///]x[/link]", "<script>alert(1)</script>",
    '"><img src=x>',
    "a|b", "`id`", "](http://x.example)", "@all", "=cmd|'/C calc'!A0", '"\n', "\\", "a\\nb", "{x}", "%s", "x" * 5000,
    "東京",
    "\u202eexe",
    "\x9b31m", "\x1b]52;c;eA==\a", "a\r\nBcc: all@x.example", *ACTS,
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project whose callers sent all of these as a category and as an entity"
    root = toy_project.make_without_context(tmp_path_factory.mktemp("text") / "project")
    log = PredictionLog(root / ".mlnb/predictions")
    t = f"{datetime.now(UTC):%Y-%m-%dT00:00:00Z}"
    said = ("v1", "champion", "", 1.0, {"probability": 0.5, "decision": True})
    log.append(
        [
            Prediction(f"r{i}{text[:900]}", text[:900], t, t, *said, {}, {"c": text})
            for i, text in enumerate(HOSTILE * 20)
        ]
    )
    log.close()
    Profile.of(pd.DataFrame({"c": np.array(["a", "b"])[np.arange(5000) % 2]})).write(root / "reference.profile")
    code = "from plain.bundle import build; build('products/bundle', reference=open('reference.profile', 'rb').read())"
    assert (done := toy_project.run(root, "-c", code)).returncode == 0, done.stderr
    return root


@pytest.fixture
def shown(project, monkeypatch):
    "What a command prints, of which no character may act"
    monkeypatch.chdir(project)

    def call(*arguments):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(cli, arguments)
        assert done.exception is None or isinstance(done.exception, (SystemExit, MlnbError)), repr(done.exception)
        acting = [c for c in done.output if not (c.isprintable() or c in "\n" or c in "\u200d")]
        assert not acting, (arguments, acting[:5], done.output[:200])
        return done.stdout

    return call


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)


def test_terminals_show_it_as_text(shown):
    table = shown("predictions", "--limit", "200")
    assert r"\u202eexe" in table and r"\x9b31m" in table and "[red]x[/red]" in table and "<script>" in table
    for command in (
        ("predictions", "--json"), ("predictions", "--version", "\x9b31m"), ("drift", "log"),
        ("drift", "log", "--json"), ("performance", "--group-by", "c"), ("performance", "--group-by", "\u202eexe"),
        ("performance", "--json", "--group-by", "c"),
        ("labels", "show", "\x9b31m"), ("alerts", "check"), ("alerts", "list", "--json"), ("alerts", "show", "1"),
        ("doctor",),
    ):  # fmt: skip
        shown(*command)
    assert shown("predictions", "--json").isascii()
    assert {row["entity"] for row in json.loads(shown("predictions", "--json", "--limit", "1000"))} == {
        text[:900] for text in HOSTILE
    }


def test_outcomes_that_are_shown(shown, project):
    rows = [
        {"entity": text, "value": "=1" if text else "", "observed_at": "2026-01-01T00:00:00Z"} for text in HOSTILE[:20]
    ]
    with (project / "y\u202e.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert r"y\u202e.csv" in shown("labels", "add", "y\u202e.csv")


def drifted(values, reference=("a", "b")):
    frames = [
        pd.DataFrame({"c": np.array(column, object)[np.arange(5000) % len(column)]}) for column in (reference, values)
    ]
    profiles = [Profile.of(frame) for frame in frames]
    return frames[1], profiles[0], compare(profiles[0], {"w": profiles[1]}, [], None, "the reference")


@pytest.mark.parametrize("text", HOSTILE)
def test_pages_draw_it_as_text(text):
    _, _, drift = drifted([text, "a"])
    drawn = page(drift, title=text)
    assert not Tags(drawn).found & {"script", "img", "a"} and not set(ACTS) & set(drawn)


@pytest.mark.parametrize("text", HOSTILE)
def test_drawings_show_it_as_text(text, monkeypatch):
    "matplotlib reads what stands between two $ as mathematics, and raises where it is none"
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    requests, reference, _ = drifted([text, "a"])
    requests, columns = requests.rename(columns={"c": text}), {text: reference.columns["c"]}
    alert_notebook.plot_columns(requests, Profile(columns), [text])
    figures[0].canvas.draw()
    plt.close("all")


@pytest.mark.parametrize("text", HOSTILE)
def test_notebooks_and_messages_say_it_as_text(text):
    alert = {
        "id": 1,
        "rule": "r",
        "kind": "drift",
        "words": f"{text} moved",
        "severity": "warning",
        "what": "firing",
        "seen": 1,
    }
    alert |= {
        "value": 1.0,
        "bound": 0.1,
        "subject": text,
        "first_seen": datetime(2026, 1, 1),
        "last_seen": datetime(2026, 1, 1),
    }
    alert["details"] = {
        "column": text,
        "segment": f"c={text}",
        "since": "2026-01-01T00:00",
        "until": "2026-01-02T00:00",
    }
    made = alert_opener.build_notebook(alert)
    head = made["cells"][0]["source"]
    plain = re.sub(r"</?span>|&#\d+;", "", markdown_text(text))
    assert not set(ACTS) & set(head) and not set("\n$\\|<>*_`[]") & set(plain)
    for cell in made["cells"]:
        if cell["cell_type"] == "code":
            compile(cell["source"], "cell", "exec")
    message = Notification(project="p", alerts=[alert])
    mail = EmailChannel(name="m", server="h:25", sender="a@x.example", to=("b@x.example",)).mail(message)
    again = message_from_bytes(mail.as_bytes(), policy=policy.default)
    assert (
        again["Bcc"] is None
        and again["To"] == "b@x.example"
        and not set(ACTS) & set(again["Subject"] + again.get_content())
    )
    said = SlackChannel(name="s", url="$S").body(message)["text"]
    assert "<" not in said and "@all" not in said and "](http" not in said and not set(ACTS) & (set(said) - {"\u200b"})


@pytest.mark.parametrize("text", HOSTILE)
def test_metrics_can_be_read(text):
    _, _, drift = drifted(["a", "c"])
    drift = replace(drift, windows=[replace(drift.windows[0], window=text)], profiles={text: drift.profiles["w"]})
    labels = [
        s.labels["window"]
        for f in text_string_to_metric_families(prometheus_text(drift, 1.0))
        for s in f.samples
        if s.labels
    ]
    assert labels and set(labels) == {printable(text)}


FORMULAS = ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1+1", "=cmd|' /C calc'!A0"]
FORMULAS += ['=HYPERLINK("http://x.example")']
PLAIN = ["-1.5", "+3", "-1e-05", "007", "a=b", "it's", "a,b", ""]


def test_scores_for_a_spreadsheet(shown, project):
    rows = [{"=name": text, "customer": "C", "age": 30, "income": -1.5} for text in [*FORMULAS, *PLAIN]]
    with (project / "in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert "Scored" in shown("score", "in.csv", "out.csv") and "Scored" in shown(
        "score", "in.csv", "safe.csv", "--spreadsheet-safe"
    )
    written = {name: list(csv.reader((project / name).open(newline=""))) for name in ("in.csv", "out.csv", "safe.csv")}
    assert [row[:4] for row in written["out.csv"]] == written["in.csv"]
    assert written["safe.csv"][0][:2] == ["'=name", "customer"]
    assert [row[0] for row in written["safe.csv"][1:]] == [*("'" + text for text in FORMULAS), *PLAIN]
    assert [row[1:] for row in written["safe.csv"]] == [row[1:] for row in written["out.csv"]]
    assert "is not a CSV file" in str(
        CliRunner().invoke(cli, ["score", "in.csv", "out.parquet", "--spreadsheet-safe"]).exception
    )


def test_predictions_for_a_spreadsheet(shown, project):
    shown("predictions", "--output", "all.csv")
    shown("predictions", "--output", "safe.csv", "--spreadsheet-safe")
    shown("predictions", "--output", "all.parquet")
    entities = pq.read_table(project / "all.parquet")["entity"].to_pylist()
    with (project / "all.csv").open(newline="") as file:
        read = {row["entity"] for row in csv.DictReader(file)}
    assert read >= {text for text in entities if "\r" not in text}  # which no service accepts
    assert "'=cmd|'/C calc'!A0" in set(pd.read_csv(project / "safe.csv")["entity"])
    assert CliRunner().invoke(cli, ["predictions", "--spreadsheet-safe"]).exit_code == 2
