"""The service with its log and with one that writes nothing, as factories for uvicorn."""

from mlnb.project.settings import load_settings
from mlnb.serving.app import app_of
from mlnb.serving.predictions import PredictionLog


def logged():
    return app_of(load_settings("."))


def unlogged():
    PredictionLog.append = lambda self, records: None
    return logged()
