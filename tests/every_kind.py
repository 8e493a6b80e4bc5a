"""Small projects of every kind of problem, input and library: each trains and bundles its model in one task."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import toy_project

HEAD = """
# %% tags=["parameters"]
upstream = None
product = None

# %%
import numpy as np
import pandas as pd
from mlnb.data.fields import Field
from mlnb.models.problems import problem_of

rng = np.random.default_rng(0)
"""

TAIL = """
# %%
from mlnb.data.fields import columns_of
from mlnb.models.write_bundle import Samples, write_bundle
from mlnb.monitoring.reference import reference_of

problem = problem_of(PROBLEM)
names = [field.name for field in FIELDS]
request = columns_of(FIELDS, table[names].head(12).to_dict("records"))
reference = reference_of(table, TIME, fields=FIELDS, predictor=predictor, problem=problem)
write_bundle(
    product["bundle"], name="shop", version="v1", request=FIELDS, entity=ENTITY, predictor=predictor, problem=problem,
    reference=reference.profile, drift=reference.thresholds, samples=Samples(request), training={"rows": len(table)},
)
"""

WEEKLY = """
# %%
from shop.model import Churn

FIELDS = [
    Field("customer", "string", "Number", "C-1"), Field("plan", "category", "Plan", "free", categories=("free", "pro")),
    Field("visits", "integer", "In the last week", 3, nullable=True), Field("active", "boolean", "Logged in", True),
]
PROBLEM, ENTITY, TIME = {"kind": "binary"}, ["customer"], "week"
n = 52 * 40
table = pd.DataFrame({
    "customer": [f"C-{i % 40}" for i in range(n)], "plan": rng.choice(["free", "pro"], n),
    "visits": np.where(rng.random(n) < 0.1, np.nan, rng.poisson(3, n)), "active": rng.random(n) < 0.8,
    "week": pd.Timestamp("2025-01-06") + pd.to_timedelta(np.arange(n) // 40 * 7, unit="D"),
})
predictor = Churn()
"""
WEEKLY_MODEL = """
import numpy as np

from mlnb.models.hooks import Model


class Churn(Model):
    def predict(self, features):
        return 1 / (1 + np.exp(np.nan_to_num(features["visits"]) - 2.0 - (features["plan"] == "pro")))
"""

FLOWERS = """
# %%
from lightgbm import LGBMClassifier
from sklearn.datasets import load_iris

from mlnb.models.adapters import LightGBMModel

raw = load_iris(as_frame=True)
table = raw.data.set_axis(["sepal", "sepal_width", "petal", "petal_width"], axis="columns")
kinds = raw.target_names[raw.target]
classifier = LGBMClassifier(n_estimators=10, min_child_samples=5, verbose=-1).fit(table, kinds)
FIELDS = [Field(name, "number", name, 1.5) for name in table]
PROBLEM, ENTITY, TIME = {"kind": "multiclass", "classes": ("setosa", "versicolor", "virginica")}, [], None
predictor = LightGBMModel(classifier, table)
"""

PRICES = """
# %%
from sklearn.linear_model import Ridge

from mlnb.models.adapters import SklearnModel

table = pd.DataFrame({"area": rng.uniform(30, 200, 400).round(1), "rooms": rng.integers(1, 7, 400).astype(float)})
price = 2000 * table["area"] + 5000 * table["rooms"] + rng.normal(0, 20_000, 400)
FIELDS = [Field("area", "number", "Square metres", 75.0), Field("rooms", "integer", "Rooms", 3)]
PROBLEM, ENTITY, TIME = {"kind": "regression", "unit": "EUR"}, [], None
predictor = SklearnModel(Ridge().fit(table, price), table)
"""

NET_MODEL = """
from pathlib import Path

from safetensors.torch import load_file, save_file

from mlnb.models.hooks import Model


class NetModel(Model):
    make = None  # makes the module

    def __init__(self, module):
        self.module = module.eval()

    def save(self, folder):
        save_file(self.module.state_dict(), Path(folder) / "weights.safetensors")

    @classmethod
    def load(cls, folder):
        module = cls.make()
        module.load_state_dict(load_file(Path(folder) / "weights.safetensors"))
        return cls(module)

"""

WORDS = """
# %%
import torch

from shop.model import Bag, Sentiment

FIELDS = [Field("text", "string", "What was written", "a good day")]
PROBLEM, ENTITY, TIME = {"kind": "binary"}, [], None
words = np.array(["good", "bad", "day", "night", "very", "long " * 40])
table = pd.DataFrame({"text": [" ".join(rng.choice(words, 5)) for _ in range(200)]})
torch.manual_seed(0)
predictor = Sentiment(Bag(64))
"""
WORDS_MODEL = f"""{NET_MODEL}
from zlib import crc32

import numpy as np
import torch


class Bag(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weights = torch.nn.EmbeddingBag(size, 1, mode="mean")

    def forward(self, text):
        numbers = [crc32(word.encode()) % self.weights.num_embeddings for word in text.split()] or [0]
        return torch.sigmoid(self.weights(torch.tensor([numbers])))[0, 0]


class Sentiment(NetModel):
    make, decimals = lambda: Bag(64), 5

    def predict(self, features):
        with torch.inference_mode():
            return np.array([float(self.module(text)) for text in features["text"].tolist()])
"""

DIGITS = """
# %%
from io import BytesIO

from PIL import Image
from sklearn.datasets import load_digits
import torch

from shop.model import Digits, Net

raw = load_digits()
PROBLEM, ENTITY, TIME = {"kind": "multiclass", "classes": tuple("0123456789")}, [], None


def png(pixels):
    Image.fromarray((pixels * 15).astype(np.uint8)).save(data := BytesIO(), "PNG")
    return data.getvalue()


table = pd.DataFrame({"photo": [png(pixels) for pixels in raw.images[:60]]})
FIELDS = [Field("photo", "image", "A digit, 8 by 8 pixels", table["photo"][0], shape=(8, 8))]
torch.manual_seed(0)
net = Net()
optimizer = torch.optim.Adam(net.parameters(), 0.05)
pixels, target = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
for _ in range(30):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(pixels), target).backward()
    optimizer.step()
predictor = Digits(net)
"""
DIGITS_MODEL = f"""{NET_MODEL}
from io import BytesIO

import numpy as np
import torch
from PIL import Image


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def forward(self, pixels):
        return self.body(pixels)


class Digits(NetModel):
    make, decimals = Net, 4

    def predict(self, features):
        images = [np.asarray(Image.open(BytesIO(data)).convert("L"), np.float32) / 240 for data in features["photo"]]
        with torch.inference_mode():
            logits = self.module(torch.tensor(np.array(images).reshape(len(images), 64)))
        return torch.softmax(logits.double(), dim=1).numpy()
"""

GRAPH = """
# %%
from onnx import TensorProto, helper, numpy_helper

from mlnb.models.adapters import OnnxModel

table = pd.DataFrame({"embedding": list(rng.normal(size=(100, 4)))})
FIELDS = [Field("embedding", "vector", "Of a document", [0.1, 0.2, 0.3, 0.4], shape=(4,))]
PROBLEM, ENTITY, TIME = {"kind": "multiclass", "classes": ("ham", "spam", "other")}, [], None
weights = numpy_helper.from_array(rng.normal(size=(4, 3)).astype(np.float32), "weights")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["embedding", "weights"], ["logits"]), helper.make_node("Softmax", ["logits"], ["p"])],
    "shop", [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [None, 4])],
    [helper.make_tensor_value_info("p", TensorProto.FLOAT, [None, 3])], [weights],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
rows = {"embedding": np.stack(table["embedding"])}
predictor = OnnxModel(model.SerializeToString(), rows, classes=("ham", "spam", "other"))
"""


@dataclass(frozen=True)
class Kind:
    "A project: the cells that train a model, the module that it exports, and labels that may come back"
    cells: str
    module: str = ""
    labels: tuple = (0, 1)
    layout: str = ""  # folder of the package below the project
    needs: tuple[str, ...] = ()  # packages that may not be installed


KINDS = {
    "weekly": Kind(WEEKLY, WEEKLY_MODEL),
    "multiclass LightGBM": Kind(FLOWERS, labels=("setosa", "virginica"), needs=("lightgbm",)),
    "regression": Kind(PRICES, labels=(123_000.5, 250_000.0)),
    "text": Kind(WORDS, WORDS_MODEL),
    "image": Kind(DIGITS, DIGITS_MODEL, labels=("3", "7")),
    "ONNX": Kind(GRAPH, labels=("spam", "ham"), needs=("onnx", "onnxruntime")),
    "existing repository": Kind(PRICES, layout="src", labels=(123_000.5, 250_000.0)),
}


def make(root: Path, kind: Kind) -> Path:
    "The project in `root`; `mlnb run` makes its bundle"
    package = root / kind.layout / "shop"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model.py").write_text(kind.module)
    (root / "nbs").mkdir()
    (root / "nbs/train.py").write_text(HEAD + kind.cells + TAIL)
    settings = '\n[tool.mlnb]\npackage = "shop"\nkeys_required = false\n' if not kind.layout else ""
    (root / "pyproject.toml").write_text(f'[project]\nname = "shop"\nversion = "0"\n{settings}')
    (root / "pipeline.yaml").write_text(
        dedent("""\
        tasks:
          - source: nbs/train.py
            name: train
            product:
              nb: products/train.ipynb
              bundle: products/bundle
        """)
    )
    for name in ("bentofile.yaml", "Dockerfile.template"):
        (root / name).write_text((toy_project.REPOSITORY / name).read_text())
    (root / "requirements.lock").write_text("numpy\n")
    return root
