import asyncio
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from hashlib import sha256
from typing import ClassVar

import httpx
import numpy as np
import pandas as pd
import pytest
import toy_project
from waiting import free_port, wait_until_ready

from mlnb.data.fields import Field
from mlnb.models.bundle import Bundle
from mlnb.models.hooks import Model
from mlnb.models.write_bundle import Samples, write_bundle
from mlnb.project.errors import BundleError
from mlnb.serving.app import create_app
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.log_records import read_tables
from mlnb.serving.predictions import PredictionLog

TREES = '''
import lightgbm
import numpy as np

from mlnb.models.hooks import Model


class Trees(Model):
    def __init__(self, booster):
        self.booster = booster

    def save(self, folder):
        self.booster.save_model(folder / "model.txt")

    @classmethod
    def load(cls, folder):
        return cls(lightgbm.Booster(model_file=folder / "model.txt"))

    def predict(self, features):
        return self.booster.predict(np.column_stack([features["distance"], features["delay"]]))
'''
LINEAR = '''
import numpy as np
import skops.io

from mlnb.models.hooks import Model


class Linear(Model):
    def __init__(self, pipeline):
        self.pipeline = pipeline

    def save(self, folder):
        skops.io.dump(self.pipeline, folder / "pipeline.skops")

    @classmethod
    def load(cls, folder):
        return cls(skops.io.load(folder / "pipeline.skops"))

    def features(self, request, context):
        return {"log_distance": np.log1p(request["distance"]), "delay": request["delay"]}

    def predict(self, features):
        return self.pipeline.predict_proba(np.column_stack(list(features.values())))[:, 1]

    def decide(self, probability):
        return (probability >= self.threshold) & (probability < 0.9)
'''
LENGTH = '''
from mlnb.models.hooks import Model


class Length(Model):
    def predict(self, features):
        return features["distance"] / 5000
'''
FIELDS = (
    Field("tail", "string", "Which plane", "N1"),
    Field("distance", "number", "Miles", 1400.0),
    Field("delay", "number", "Minutes so far", 3.0),
)
SERVER = """
import sys
import uvicorn
from mlnb.project.settings import load_settings
from mlnb.serving.app import load_app
uvicorn.run(load_app(load_settings(".")), port=int(sys.argv[1]), log_level="warning")
"""


def rows(n=40):
    rng = np.random.default_rng(0)
    return {
        "tail": np.array([f"N{i}" for i in range(n)]),
        "distance": rng.uniform(100, 2500, n),
        "delay": rng.normal(0, 20, n),
    }


def about(**other):
    return {
        "name": "planes",
        "request": FIELDS,
        "entity": ["tail"],
        "samples": Samples(rows()),
        "training": {},
        "version": "v1",
    } | other


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project whose package has two models of its own, fitted and in bundles"
    import lightgbm
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    root = tmp_path_factory.mktemp("planes")
    (root / "planes").mkdir()
    for name, text in {"__init__": "", "trees": TREES, "linear": LINEAR, "length": LENGTH}.items():
        (root / f"planes/{name}.py").write_text(text)
    (root / "pyproject.toml").write_text(
        '[project]\nname = "planes"\n[tool.mlnb]\npackage = "planes"\nkeys_required = false\n'
    )
    sys.path.insert(0, str(root))
    from planes.length import Length
    from planes.linear import Linear
    from planes.trees import Trees

    columns = rows(400)
    late = columns["delay"] > columns["distance"] / 100
    plain = lightgbm.Dataset(np.column_stack([columns["distance"], columns["delay"]]), late)
    booster = lightgbm.train({"objective": "binary", "verbosity": -1, "num_threads": 1}, plain, 10)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    pipeline.fit(np.column_stack([np.log1p(columns["distance"]), columns["delay"]]), late)
    write_bundle(root / "trees", predictor=Trees(booster), **about())
    write_bundle(root / "length", predictor=Length(), **about())
    write_bundle(root / "linear", predictor=Linear(pipeline), threshold=0.3, **about())
    yield root
    sys.path.remove(str(root))


@contextmanager
def serving(root, bundle):
    port, env = (
        free_port(),
        toy_project.environment(root) | {"MLNB_BUNDLE": bundle, "MLNB_PREDICTIONS": f".mlnb/{bundle}"},
    )
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], cwd=root, env=env)
    try:
        yield wait_until_ready(process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("name", "files", "features"), [
    ("trees", ["model.txt"], ["tail", "distance", "delay"]),
    ("linear", ["pipeline.skops"], ["log_distance", "delay"]),
])  # fmt: skip
def test_a_model_of_another_library_is_served_to_the_bit(project, name, files, features):
    bundle = Bundle.load(project / name)
    samples, outputs = bundle.samples, bundle.samples["outputs"]
    assert bundle.self_test() == 40 and [p.name for p in (project / name / "model").iterdir()] == files
    with serving(project, name) as url:
        many = httpx.post(f"{url}/predict", json=samples["requests"]).json()
        one = [httpx.post(f"{url}/predict", json=r).json() for r in samples["requests"][:5]]
        assert httpx.post(f"{url}/predict", json={"tail": "N1"}).status_code == 400
    assert [a["probability"] for a in many] == outputs["probability"]
    assert [a["decision"] for a in many] == outputs["decision"]
    assert [a["probability"] for a in one] == outputs["probability"][:5]
    assert (many[0]["context_moment"], many[0]["context_age_seconds"]) == (None, None)
    table = read_predictions(project / f".mlnb/{name}").set_index("request_id").loc[[a["request_id"] for a in many]]
    assert table["entity"].tolist() == [f"N{i}" for i in range(40)] and set(features) <= set(table)


WAYS = (
    b'{"tail": "N\\u00e9\\"1", "distance": 1400, "delay": -3}',
    '{"delay":-3.0,"tail":"Né\\"1","distance":1.4e3}'.encode(),
    '{\n  "tail": "Né\\"1",\n  "distance": 1400.0,\n  "delay": -3\n}\n'.encode(),
    '[{"tail": "Né\\"1", "distance": 1400, "delay": -3}]'.encode(),
    '{"tail": "Né\\"1", "distance": 1400, "delay": -3, "decision_time": "2013-07-01T05:00:00Z"}'.encode(),
    b" " * 5000 + '{"tail": "Né\\"1", "distance": 1400, "delay": -3}'.encode(),
)


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_row_is_the_same_in_the_log_whichever_way_it_was_written(project, way):
    with serving(project, "length") as url:
        answer = httpx.post(f"{url}/predict", content=WAYS[way]).json()
        record = answer if isinstance(answer, dict) else answer[0]
    (file,) = [f for f in (project / ".mlnb/length").iterdir() if record["request_id"] in f.read_text()]
    ((table),) = read_tables(file, damaged := [])
    names = ("tail", "distance", "delay")
    assert [table[f"input.{n}"].to_pylist() for n in names] == [['Né"1'], [1400.0], [-3.0]] and not damaged
    assert [table[f"features.{n}"] for n in names] == [table[f"input.{n}"] for n in names]
    assert [str(table.schema.field(f"input.{n}").type) for n in names] == ["string", "double", "double"]
    assert "features.decision_time" not in table.column_names and file.stat().st_size < 800


def test_the_hook_decides(project):
    bundle = Bundle.load(project / "linear")
    assert bundle.decide(np.array([0.2, 0.3, 0.89, 0.95])).tolist() == [False, True, True, False]
    assert Bundle.load(project / "trees").decide(np.array([0.3, 0.5])).tolist() == [False, True]
    assert any(bundle.samples["outputs"]["decision"]) and not all(bundle.samples["outputs"]["decision"])


def test_a_model_needs_no_more_than_predict(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", predictor=Half(), **about())
    shutil.rmtree(tmp_path / "bundle/model")  # an empty folder, which a store of files does not keep
    assert Bundle.load(tmp_path / "bundle").self_test() == 40 and set(bundle.samples["outputs"]["probability"]) == {0.5}
    assert list(bundle.samples["requests"][0]) == ["tail", "distance", "delay"]


def test_code_that_changed_since_training_is_refused(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__"))
    load = ("-c", "from mlnb.models.bundle import Bundle; print(Bundle.load('length').self_test())")
    source = copy / "planes/length.py"
    source.write_text(source.read_text() + "\n# a comment\n")
    assert toy_project.run(copy, *load).stdout == "40\n"
    source.write_text(source.read_text().replace("5000", "6000"))
    assert "trained with another planes.length.Length" in toy_project.run(copy, *load).stderr


def test_a_flipped_bit_in_the_weights(project, tmp_path):
    copy = shutil.copytree(project / "linear", tmp_path / "linear")
    (copy / "model/pipeline.skops").write_bytes((copy / "model/pipeline.skops").read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="has changed since it was written"):
        Bundle.load(copy)


def test_a_class_that_does_not_load(project, tmp_path):
    copy = shutil.copytree(project / "trees", tmp_path / "trees")
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "model/model.txt").write_text("no trees")
    manifest["files"]["model/model.txt"] = sha256(b"no trees").hexdigest()
    (copy / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"planes.trees.Trees cannot load model/"):
        Bundle.load(copy)


class Half(Model):
    def predict(self, features):
        return np.full(len(features["tail"]), 0.5, np.float32)


class Table(Half):
    def predict(self, features):
        return np.zeros((len(features["tail"]), 2))


class One(Half):
    def predict(self, features):
        return 0.5


class OneDecision(Half):
    def decide(self, probability):
        return True


class Scalar(Half):
    def features(self, request, point_in_time):
        return request | {"month": 7}


class Writes(Half):
    def features(self, request, point_in_time):
        request["distance"] /= 1000
        return request


class WritesLater(Half):
    def predict(self, features):
        features["delay"][features["delay"] < 0] = 0
        return super().predict(features)


class Bare:
    def save(self, folder):
        pass


@pytest.mark.parametrize(("predictor", "more", "says"), [
    (Table(), {}, r"probability has shape \(40, 2\) for 40 rows; give one value a row"),
    (One(), {}, r"probability has shape \(\)"),
    (OneDecision(), {}, r"decision has shape \(\)"),
    (Scalar(), {}, r"feature 'month' has shape \(\)"),
    (Half(), {"numeric": ["speed"]}, "feature 'speed' is in neither"),
    (Writes(), {}, r"Writes or its features write to a column of the request.* write to a copy of it: column.copy\(\)"),
    (WritesLater(), {}, "WritesLater or its features write to a column of the request"),
    (Half(), {"request_features": "toy.features.request_features"}, "leave request_features out"),
    (Bare(), {}, "has no hook `features`"),
])  # fmt: skip
def test_a_hook_that_gives_something_else(toy, tmp_path, predictor, more, says):
    with pytest.raises(BundleError, match=says):
        write_bundle(tmp_path / "bundle", predictor=predictor, **about(**more))
    assert not list(tmp_path.iterdir())


class Odd(Half):
    "A model whose hooks give what a test says"
    given: ClassVar = {}  # name of a hook -> what is called instead

    def features(self, request, point_in_time):
        return {"tail": request["tail"]} | (
            {"x": self.given["features"](len(request["tail"]))} if "features" in self.given else {}
        )

    def predict(self, features):
        return self.given["predict"](len(features["tail"])) if "predict" in self.given else super().predict(features)

    def decide(self, probability):
        return self.given["decide"](probability) if "decide" in self.given else super().decide(probability)


NO_DECISIONS = {
    "integers": lambda p: (p > 0.5).astype(np.int64),
    "floats": lambda p: p,
    "texts": lambda p: np.where(p > 0.5, "yes", "no"),
    "objects": lambda p: (p > 0.5).astype(object),
    "objects with None": lambda p: np.array([None] * len(p)),
    "nothing": lambda p: None,
    "one": lambda p: np.bool_(True),
    "a number": lambda p: 1,
    "too few": lambda p: (p > 0.5)[1:],
    "too many": lambda p: np.tile(p > 0.5, 2),
    "a table": lambda p: (p > 0.5)[:, None],
    "a list of numbers": lambda p: [1] * len(p),
    "a list of lists": lambda p: [[True]] * len(p),
    "a Series of numbers": lambda p: pd.Series(p > 0.5).astype("int8"),
    "a Series that may miss": lambda p: pd.Series([True, None] * 20, dtype="boolean"),
    "times": lambda p: np.full(len(p), "2013", "datetime64[s]"),
}
NO_PROBABILITIES = {
    "texts": lambda n: np.full(n, "0.5"),
    "objects": lambda n: np.full(n, 0.5, object),
    "a column": lambda n: np.full((n, 1), 0.5),
    "above 1": lambda n: np.full(n, 1.01),
    "percent": lambda n: np.full(n, 50),
    "below 0": lambda n: np.full(n, -0.01, np.float32),
    "NaN": lambda n: np.array([0.5] * (n - 1) + [np.nan]),
    "infinite": lambda n: np.full(n, np.inf),
    "complex": lambda n: np.full(n, 0.5 + 0j),
    "too few": lambda n: np.full(n - 1, 0.5),
    "nothing": lambda n: None,
    "a dictionary": lambda n: {"p": 0.5},
    "times": lambda n: np.zeros(n, "datetime64[s]"),
}
NO_FEATURES = {
    "objects": lambda n: np.full(n, "x", object),
    "bytes": lambda n: np.full(n, b"x"),
    "complex": lambda n: np.zeros(n, complex),
    "a list": lambda n: [1.0] * n,
    "nothing": lambda n: None,
    "texts in a table": lambda n: np.full((n, 2), "x"),
    "lengths of time": lambda n: np.zeros(n, "timedelta64[s]"),
}


WHAT = {"decide": "decision has", "predict": "probability", "features": "feature 'x' has"}
ODD = {"decide": NO_DECISIONS, "predict": NO_PROBABILITIES, "features": NO_FEATURES}


@pytest.mark.parametrize(("hook", "name"), [(hook, name) for hook, gives in ODD.items() for name in gives])
def test_what_could_not_be_logged_as_it_was_answered_is_no_bundle(toy, tmp_path, monkeypatch, hook, name):
    monkeypatch.setattr(Odd, "given", {hook: ODD[hook][name]})
    with pytest.raises(BundleError, match=WHAT[hook]):
        write_bundle(tmp_path / "bundle", predictor=Odd(), **about())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("give", [lambda p: list(p > 0.4), lambda p: (p > 0.4).tolist(), lambda p: pd.Series(p > 0.4)])
def test_true_and_false_in_any_container_are_decisions(tmp_path, monkeypatch, give):
    monkeypatch.setattr(Odd, "given", {"decide": give})
    bundle = write_bundle(tmp_path / "bundle", predictor=Odd(), **about())
    assert bundle.decide(np.array([0.2, 0.5])).tolist() == [False, True]


LATER = {
    "decide": [lambda p: (p > 0.5).astype(int), lambda p: [1] * len(p), lambda p: None, lambda p: (p > 0.5)[:-1]],
    "predict": [
        lambda n: np.full(n, 7.0),
        lambda n: np.full(n, "0.5"),
        lambda n: np.full((n, 1), 0.5),
        lambda n: np.full(n - 1, 0.5),
    ],
    "features": [
        lambda n: np.array([object()] * n),
        lambda n: np.zeros(n - 1),
        lambda n: np.full(n, "-9999", "datetime64[s]"),
    ],
}


@pytest.mark.parametrize(("hook", "at"), [(hook, at) for hook, gives in LATER.items() for at in range(len(gives))])
@pytest.mark.parametrize("form", ["rows", "table"])
def test_a_model_that_goes_wrong_after_its_self_test_answers_and_logs_nothing_false(
    tmp_path, monkeypatch, hook, at, form
):
    bundle = write_bundle(tmp_path / "bundle", predictor=Odd(), **about())
    app = create_app(bundle, None, PredictionLog(tmp_path / "log"))
    body = b'[{"tail": "N1", "distance": 1, "delay": 2}, {"tail": "N2", "distance": 1, "delay": 2}]'
    path = "/predict"
    if form == "table":
        path, body = "/predict/columns", b'{"tail": ["N1", "N2"], "distance": [1, 1], "delay": [2, 2]}'
    assert ask(app, path, body) == 200 and len(read_predictions(tmp_path / "log")) == 2
    monkeypatch.setattr(Odd, "given", {hook: LATER[hook][at]})
    status = ask(app, path, body)
    table = read_predictions(tmp_path / "log")
    assert table.attrs["torn"] == 0 and (status, len(table)) in ((500, 2), (200, 4))
    assert status == 500 or hook == "features"  # a feature that JSON can say is logged as it was


def ask(app, path, body):
    "The status of one request"
    sent = []

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b""}
    asyncio.run(app(scope | {"headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 1)}, receive, send))
    return sent[0]["status"]


def test_a_model_without_predict(tmp_path):
    with pytest.raises(NotImplementedError, match="write: def predict"):
        write_bundle(tmp_path / "bundle", predictor=Model(), **about())
