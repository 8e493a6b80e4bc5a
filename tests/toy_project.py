"""A tiny but real project: a package with features and a model, a context in storage, a bundle. Independent of the
reference project."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent

import httpx

FEATURES = '''
import numpy as np

from mlnb.data.point_in_time import PointInTimeFeatures, Events, FeatureView


def request_features(request):
    """What follows from the request alone"""
    seconds = request["departure"].astype(np.int64)
    hour = (seconds // 3600 % 24).astype(np.float64)
    return {"origin": request["origin"], "hour": hour, "distance": np.log1p(request["distance"])}


def _backlog(history, pairs):
    count, _ = Events({"origin": history["origin"]}, history["time"]).window(pairs, -3600)
    return {"backlog": np.where(count == 0, np.nan, count.astype(np.float64))}


def _known(history):
    return {"origin": np.unique(history["origin"])}


context_features = PointInTimeFeatures([FeatureView("origin", ("origin",), ("backlog",), _backlog, _known)])
'''

MODEL = """
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


class Logistic:
    def __init__(self, weights):
        self.weights = np.asarray(weights, np.float64)

    def predict(self, features):
        backlog = np.nan_to_num(features["backlog"])
        columns = [features["origin"] == "JFK", features["hour"], features["distance"], backlog]
        z = sum(w * c for w, c in zip(self.weights, columns))
        return np.round(1 / (1 + np.exp(-z)), 9)

    def save(self, folder):
        Path(folder).mkdir(parents=True)
        save_file({"weights": self.weights}, str(Path(folder) / "weights.safetensors"))

    @classmethod
    def load(cls, folder):
        return cls(load_file(str(Path(folder) / "weights.safetensors"))["weights"])
"""

BUNDLE = """
import sys

import numpy as np

from mlnb.data.point_in_time import floor_to_interval
from mlnb.data.snapshot_store import SnapshotStore
from mlnb.data.fields import Field
from mlnb.models.write_bundle import Samples, write_bundle
from toy.features import context_features
from toy.model import Logistic

REQUEST = [
    Field("carrier", "string", "Airline", "UA"),
    Field("flight", "integer", "Flight number", 1545),
    Field("origin", "string", "Where it starts", "EWR"),
    Field("distance", "number", "Miles", 1400.0),
    Field("departure", "time", "Scheduled departure", "2013-07-01T05:15:00-04:00"),
]


def history():
    times = np.datetime64("2013-07-01T00:00:00") + np.arange(0, 86400, 600)
    return {"origin": np.array(["JFK", "EWR", "JFK"])[np.arange(len(times)) % 3], "time": times}


def samples(n=12):
    departure = np.datetime64("2013-07-01T05:00:00") + np.arange(n) * 1800
    requests = {
        "carrier": np.array(["UA", "B6", "DL"])[np.arange(n) % 3],
        "flight": np.arange(n, dtype=np.float64) + 100,
        "origin": np.array(["JFK", "EWR", "LGA"])[np.arange(n) % 3],
        "distance": np.linspace(200.0, 2400.0, n),
        "departure": departure,
        "decision_time": departure - 7200 + 60,
    }
    as_of = np.unique(floor_to_interval(requests["decision_time"]))
    return Samples(requests, list(context_features.snapshots(history(), as_of)))


def build(folder, version="v1", weights=(0.5, 0.05, -0.3, 0.4), **more):
    arguments = dict(
        name="toy", version=version, request=REQUEST, entity=["carrier", "flight", "origin", "departure"],
        request_features="toy.features.request_features", context_features="toy.features.context_features",
        categorical=["origin"], numeric=["hour", "distance", "backlog"], predictor=Logistic(weights), threshold=1 / 3,
        reference=b"profile", samples=samples(), training={"run": "r1"},
    )
    return write_bundle(folder, **(arguments | more))


def store(url):
    store = SnapshotStore(url)
    as_of = np.datetime64("2013-07-01T02:00:00") + np.arange(0, 8 * 3600, 900)
    for snapshot in context_features.snapshots(history(), as_of):
        store.write(snapshot)


if __name__ == "__main__":
    build("products/bundle", *sys.argv[1:])
    store(".mlnb/storage/context")
"""

REPOSITORY = Path(__file__).parent.parent
PYPROJECT = """
[project]
name = "toy"
version = "0"
[tool.mlnb]
package = "toy"
keys_required = false
"""


def environment(root: Path) -> dict[str, str]:
    "Variables of a process that works in the project below `root`"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLNB_", "BENTOML_", "PROMETHEUS_"))}
    return inherited | {"PYTHONPATH": str(root), "PATH": f"{Path(sys.executable).parent}:{inherited['PATH']}"}


def run(root: Path, *command: str) -> subprocess.CompletedProcess:
    "A Python command in the project below `root`"
    return subprocess.run([sys.executable, *command], cwd=root, env=environment(root), capture_output=True, text=True)


get, post, put = (
    partial(send, timeout=60) for send in (httpx.get, httpx.post, httpx.put)
)  # httpx itself waits 5 seconds


def example(root: Path, **other) -> dict:
    "A request that the bundle of `root` answers"
    return json.loads((root / "products/bundle/samples.json").read_text())["requests"][0] | other


SCORECARD_MODEL = '''
import numpy as np

from mlnb.models.hooks import Model


class Scorecard(Model):
    def predict(self, features):
        return 1 / (1 + np.exp(3 - features["age"] / 20 - features["income"] / 1e5))
'''

SCORECARD_BUNDLE = """
import sys

import numpy as np

from mlnb.data.fields import Field
from mlnb.models.write_bundle import Samples, write_bundle
from plain.model import Scorecard

REQUEST = [
    Field("customer", "string", "Customer number", "C-0017"),
    Field("age", "integer", "Years", 44),
    Field("income", "number", "A year", 52000.5),
]


def build(folder, entity=(), **more):
    n = np.arange(12)
    requests = {"customer": np.array([f"C-{i:04}" for i in n]), "age": n * 5.0 + 20, "income": n * 9e3 + 1e4}
    arguments = dict(
        name="plain", version="v1", request=REQUEST, entity=list(entity), predictor=Scorecard(),
        samples=Samples(requests), training={}
    )
    return write_bundle(folder, **(arguments | more))


if __name__ == "__main__":
    build("products/bundle", sys.argv[1:])
"""


def make(root: Path) -> Path:
    "A project in `root` with its bundle and a day of context"
    return _make(root, "toy", {"features": FEATURES, "model": MODEL, "bundle": BUNDLE})


def make_without_context(root: Path, *entity: str) -> Path:
    "A project whose model has no context, times, categories or reference, and no entity unless fields are named"
    return _make(root, "plain", {"model": SCORECARD_MODEL, "bundle": SCORECARD_BUNDLE}, *entity)


def _make(root: Path, package: str, modules: dict[str, str], *arguments: str) -> Path:
    (root / package).mkdir(parents=True)
    for name, text in {"__init__": "", **modules}.items():
        (root / package / f"{name}.py").write_text(text)
    (root / "pyproject.toml").write_text(dedent(PYPROJECT).replace('"toy"', f'"{package}"'))
    for name in ("bentofile.yaml", "Dockerfile.template"):
        (root / name).write_text((REPOSITORY / name).read_text())
    (root / "requirements.lock").write_text("numpy\n")
    done = run(root, "-m", f"{package}.bundle", *arguments)
    assert done.returncode == 0, done.stderr
    return root
