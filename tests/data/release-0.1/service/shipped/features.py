import numpy as np

from mlnb.data.context import Context, Events, View


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


context_features = Context([View("origin", ("origin",), ("backlog",), _backlog, _known)])
