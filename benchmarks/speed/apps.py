"""The service with its log and with one that writes nothing, as factories for uvicorn."""

from mlnb.project.settings import load_settings
from mlnb.serving.app import load_app
from mlnb.serving.predictions import PredictionLog


def logged():
    return load_app(load_settings("."))


def unlogged():
    PredictionLog.append = lambda self, records: None
    return logged()
