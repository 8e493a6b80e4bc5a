"""The project that is served: two versions of the model, alike but for their names, registered as champion and
challenger."""

import numpy as np

from mlnb.data.fields import Field
from mlnb.models.registry import Tracking
from mlnb.models.write_bundle import Samples, write_bundle
from mlnb.project.settings import load_settings
from speed.mlp import NAMES, THRESHOLD, Mlp, requests

ALIASES = {"champion": "v1", "challenger": "v2"}
FIELDS = [
    Field("customer", "string", "Whose row it is", "c000000"),
    *(Field(name, "number", "A number", 0.5) for name in NAMES),
]


def bundle(version: str) -> str:
    """Write a version and return its folder."""
    rows, folder = requests(8), f"products/{version}"
    write_bundle(
        folder, name="speed", version=version, request=FIELDS, entity=["customer"],
        request_features="speed.features.request_features",
        categorical=[], numeric=NAMES, predictor=Mlp.random(0), threshold=THRESHOLD, reference=None,
        samples=Samples({name: np.array([row[name] for row in rows]) for name in rows[0]}), training={"run": "none"},
    )  # fmt: skip
    return folder


if __name__ == "__main__":
    tracking = Tracking((settings := load_settings(".")).url(settings.tracking))
    for alias, version in ALIASES.items():
        with tracking.run("speed", version) as run:
            tracking.set_alias("speed", alias, tracking.register("speed", bundle(version), run))
