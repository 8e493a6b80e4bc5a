import sys

import numpy as np

from mlnb.data.context import SnapshotStore, quarter
from mlnb.models.bundle import Field, Samples, write_bundle
from shipped.features import context_features
from shipped.model import Logistic

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
    return Samples(requests, list(context_features.snapshots(history(), np.unique(quarter(requests["decision_time"])))))


def build(folder, version="v1", weights=(0.5, 0.05, -0.3, 0.4), **more):
    arguments = dict(
        name="toy", version=version, request=REQUEST, entity=["carrier", "flight", "origin", "departure"],
        request_features="shipped.features.request_features", context_features="shipped.features.context_features",
        categorical=["origin"], numeric=["hour", "distance", "backlog"], predictor=Logistic(weights), threshold=1 / 3,
        reference=b"profile", samples=samples(), training={"run": "r1"},
    )
    return write_bundle(folder, **(arguments | more))


def store(url):
    store = SnapshotStore(url)
    for snapshot in context_features.snapshots(history(), np.datetime64("2013-07-01T02:00:00") + np.arange(0, 8 * 3600, 900)):
        store.write(snapshot)


if __name__ == "__main__":
    build("products/bundle", *sys.argv[1:])
    store(".mlnb/storage/context")
