"""A tiny project for each kind of problem, without a context: its model, its bundle and its requests."""

import sys
from pathlib import Path

from toy_project import PYPROJECT, REPOSITORY, run

MODEL = """
from io import BytesIO

import numpy as np
from PIL import Image

from mlnb.models.hooks import Model


class Churn(Model):
    def predict(self, features):
        return 1 / (1 + np.exp(features["months"] / 12 - features["calls"]))


class Digits(Model):
    "The class whose pixels are closest"

    def predict(self, features):
        centers = np.array([[0.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
        distances = ((features["pixels"][:, None, :] - centers) ** 2).sum(2)
        weights = np.exp(-distances)
        return weights / weights.sum(1, keepdims=True)


class Prices(Model):
    def features(self, request, point_in_time):
        area = np.nan_to_num(request["area"], nan=80.0)
        return {"rooms": request["rooms"], "area": area, "is_oslo": request["city"] == "Oslo"}

    def predict(self, features):
        price = 10.0 * features["rooms"] + 2.5 * features["area"] + 40 * features["is_oslo"]
        return np.column_stack([price, price - 20, price + 20])


class Photos(Model):
    "The brightness of a photograph, and whether a document comes with it"

    def features(self, request, point_in_time):
        bright = [np.nan if p is None else Image.open(BytesIO(p)).getextrema()[0] for p in request["photo"]]
        return {
            "bright": np.array(bright),
            "document": np.array([d is not None for d in request["document"]]), "flash": request["flash"],
            "pixels": request["pixels"].reshape(len(request["pixels"]), -1), "taken": request["taken"],
        }  # fmt: skip

    def predict(self, features):
        return np.nan_to_num(features["bright"], nan=0) / 255


class Texts(Model):
    "Answers of every type"

    def features(self, request, point_in_time):
        length = np.char.str_len(request["text"].astype(str)).astype(float)
        return {"text": request["text"], "length": length, "twice": np.column_stack([length, 2 * length])}

    def predict(self, features):
        length = features["length"]
        return {
            "topic": np.where(length > 20, "long", "short"), "score": length / 7, "words": length.astype(int) // 5,
            "is_long": length > 20, "embedding": np.column_stack([length, -length, length / 3]),
            "due": np.datetime64("2026-01-01T00:00:00") + length.astype(int),
        }  # fmt: skip
"""

BUNDLE = """
import sys
from io import BytesIO

import numpy as np
from PIL import Image

from mlnb.data.fields import Field
from mlnb.models.binary import Binary
from mlnb.models.custom import Custom
from mlnb.models.multiclass import Multiclass
from mlnb.models.regression import Regression
from mlnb.models.write_bundle import Samples, write_bundle
from tiny import model

def png(grey):
    Image.new("L", (6, 4), grey).save(file := BytesIO(), "PNG")
    return file.getvalue()


n = np.arange(12)
KINDS = {
    "binary": {
        "predictor": model.Churn, "problem": Binary(), "entity": ("customer",),
        "request": [
            Field("customer", "string", "Customer number", "C-0017"), Field("months", "integer", "Months", 7),
            Field("calls", "number", "Calls a week", 1.5, nullable=False),
        ],
        "samples": {"customer": np.array([f"C-{i:04}" for i in n]), "months": n * 3.0, "calls": n / 4},
    },
    "multiclass": {
        "predictor": model.Digits, "problem": Multiclass(classes=("zero", "one", "eight")),
        "request": [Field("pixels", "vector", "Brightness of each pixel", [0.0, 0.5, 0.0, 1.0], shape=(4,))],
        "samples": {"pixels": np.random.default_rng(0).random((12, 4))},
    },
    "regression": {
        "predictor": model.Prices, "problem": Regression(interval=0.8, unit="kEUR"), "entity": ("house",),
        "request": [
            Field("house", "string", "Address", "Elm Street 7"), Field("rooms", "integer", "Rooms", 3),
            Field("area", "number", "Square metres", 81.5, nullable=True),
            Field("city", "category", "City", "Oslo", categories=("Oslo", "Bergen")),
        ],
        "samples": {
            "house": np.array([f"Elm Street {i}" for i in n]), "rooms": n % 5 + 1.0,
            "area": np.where(n % 4, n * 9.5, np.nan), "city": np.where(n % 2, "Oslo", "Bergen"),
        },
    },
    "image": {
        "predictor": model.Photos, "problem": Binary(),
        "request": [
            Field("photo", "image", "What was seen", png(7), nullable=True, max_length=10_000),
            Field("document", "bytes", "What was said", b"hi", nullable=True),
            Field("pixels", "tensor", "Grey values", [[1, 2], [3, 4]], dtype="uint8", shape=(2, 2)),
            Field("flash", "boolean", "Whether with flash", True, default=False),
            Field("taken", "time", "When", "2026-01-01T00:00:00Z", nullable=True),
        ],
        "samples": {
            "photo": np.array([png(int(10 * i)) if i % 5 else None for i in n], object),
            "document": np.array([bytes([i]) * 3 if i % 3 else None for i in n], object),
            "pixels": np.arange(48, dtype=np.uint8).reshape(12, 2, 2), "flash": n % 2 == 0,
            "taken": np.where(n % 4, np.datetime64("2026-01-01T00:00:00"), np.datetime64("NaT")),
        },
    },
    "custom": {
        "predictor": model.Texts,
        "problem": Custom(
            (
                Field("topic", "category", "Topic", "long", categories=("long", "short")),
                Field("score", "number", "Score", 0.5), Field("words", "integer", "Words", 3),
                Field("is_long", "boolean", "Whether it is long", True),
                Field("embedding", "vector", "Embedding", [1.0, -1.0, 0.5], shape=(3,)),
                Field("due", "time", "When it is due", "2026-01-01T00:00:00Z"),
            ),
            label_field=Field("value", "category", "Topic", "long", categories=("long", "short")),
        ),
        "request": [Field("text", "string", "What was written", "Where is my parcel?", nullable=True)],
        "samples": {"text": np.array(["", "ja", "Where is it?", "=1+1", "ü" * 300, "Thanks a lot for the help"] * 2)},
    },
}  # fmt: skip


def build(folder, kind, **more):
    arguments = {"name": kind, "version": "v1", "training": {}} | KINDS[kind]
    arguments |= {"predictor": arguments["predictor"](), "samples": Samples(arguments["samples"])}
    return write_bundle(folder, **(arguments | more))


if __name__ == "__main__":
    build("products/bundle", sys.argv[1])
"""

KINDS, LONG_KINDS = ("binary", "multiclass", "regression", "custom"), ("image",)


def make(root: Path, kind: str) -> Path:
    "A project in `root` with its bundle, for one of the `KINDS` or `LONG_KINDS`"
    (root / "tiny").mkdir(parents=True)
    for name, text in {"__init__": "", "model": MODEL, "bundle": BUNDLE}.items():
        (root / "tiny" / f"{name}.py").write_text(text)
    (root / "pyproject.toml").write_text(PYPROJECT.replace('"toy"', '"tiny"'))
    for name in ("bentofile.yaml", "Dockerfile.template"):
        (root / name).write_text((REPOSITORY / name).read_text())
    (root / "requirements.lock").write_text("numpy\n")
    done = run(root, "-m", "tiny.bundle", kind)
    assert done.returncode == 0, done.stderr
    return root


if __name__ == "__main__":  # python tests/kinds.py FOLDER KIND
    make(Path(sys.argv[1]), sys.argv[2])
