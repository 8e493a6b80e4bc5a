"""The request's numbers are the features; the model needs no context."""

from speed.mlp import NAMES


def request_features(request):
    """The numbers as they came"""
    return {name: request[name] for name in NAMES}
