"""One entity's rows are removed from lines, columns, Parquet and labels, while a service answers requests."""

import threading
from datetime import UTC, datetime, timedelta

import httpx
import kinds
import pytest
from click.testing import CliRunner
from test_app import serving

from mlnb.cli import main
from mlnb.project.settings import load_settings
from mlnb.serving.compactor import Compactor
from mlnb.serving.forget import forget
from mlnb.serving.labels import Label, LabelLog, LabelStore, compact_labels
from mlnb.serving.log_reader import LogReader

ROW = {"customer": "C-1", "months": 7, "calls": 1.5}


def label(entity):
    now = datetime.now(UTC) - timedelta(minutes=1)
    return Label(entity, 1.0, now, now, "service")


@pytest.fixture
def project(tmp_path):
    return kinds.make(tmp_path / "project", "binary")


def entities(settings):
    labels = LabelStore.of(settings)
    return LogReader.of(settings).frame()["entity"].tolist(), labels.read()["entity"].to_pylist()


def test_one_entity_is_forgotten_while_the_service_runs(project, monkeypatch):
    monkeypatch.chdir(project)
    settings, rows = load_settings(project), [ROW | {"customer": f"C-{i}"} for i in (1, 2, 11)]
    columns = {name: [row[name] for row in rows] for name in ROW}
    labels, sent = LabelLog.of(settings), []
    labels.append([label("C-1"), label("C-2")])
    labels.close()
    compact_labels(LabelStore.of(settings))
    labels.append([label("C-1"), label("C-11")])
    log = project / ".mlnb/predictions"
    requests = lambda client: (client.post("/predict", json=rows), client.post("/predict/columns", json=columns))
    with serving(project, log) as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        requests(client)
    Compactor.of(settings).run()
    with serving(project, log) as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        requests(client)
        before, stopping = forget(settings, "C-1"), threading.Event()

        def send():
            while not stopping.is_set():
                answers = client.post("/predict", json=[ROW | {"customer": "C-3"}] * 3).json()
                sent.extend(answer["request_id"] for answer in answers)

        (sender := threading.Thread(target=send)).start()
        done = CliRunner().invoke(main.cli, ["forget", "C-1", "--yes"])
        stopping.set()
        sender.join()
    assert list(before.values()) == [2, 2, 1, 1, 0] and done.exit_code == 0, done.output
    assert "Removed 2 rows in lines of the prediction log, 2 rows in Parquet of the prediction log" in done.output
    for _ in range(2):
        logged, labelled = entities(settings)
        assert sorted(labelled) == ["C-11", "C-2"] and "C-1" not in logged
        assert (logged.count("C-2"), logged.count("C-11"), logged.count("C-3")) == (4, 4, len(sent))
        Compactor.of(settings).run()
    assert sent and set(sent) <= set(LogReader.of(settings).frame()["request_id"])
    left = [path for path in (project / ".mlnb").rglob("*") if path.is_file() and b'"C-1"' in path.read_bytes()]
    assert left == [] and set(forget(settings, "C-1").values()) == {0}
    shown = CliRunner().invoke(main.cli, ["forget", "C-2"]).output
    assert "'C-2' has 4 rows in Parquet of the prediction log" in shown and "add --yes" in shown
    assert "No row or label of 'C-99' is stored" in CliRunner().invoke(main.cli, ["forget", "C-99", "--yes"]).output
