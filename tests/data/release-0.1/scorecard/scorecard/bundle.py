import sys

import numpy as np

from mlnb.models.bundle import Field, Samples, write_bundle
from scorecard.model import Scorecard

REQUEST = [
    Field("customer", "string", "Customer number", "C-0017"),
    Field("age", "integer", "Years", 44),
    Field("income", "number", "A year", 52000.5),
]


def build(folder, entity=(), **more):
    n = np.arange(12)
    requests = {"customer": np.array([f"C-{i:04}" for i in n]), "age": n * 5.0 + 20, "income": n * 9e3 + 1e4}
    arguments = dict(
        name="plain", version="v1", request=REQUEST, entity=list(entity), predictor=Scorecard(), samples=Samples(requests), training={}
    )
    return write_bundle(folder, **(arguments | more))


if __name__ == "__main__":
    build("products/bundle", sys.argv[1:])
