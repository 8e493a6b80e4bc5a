"""From a notebook in JupyterLab to a monitored model in production."""

import os

__version__ = "0.1.0"

# Telemetry of every library is off, here and in every process that inherits this environment, before any of them is imported.
os.environ.update(
    BENTOML_DO_NOT_TRACK="True",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    PLOOMBER_STATS_ENABLED="false",
    RAY_USAGE_STATS_ENABLED="0",
    WHYLOGS_NO_ANALYTICS="1",
)

from .project import renames  # what has another name now can be imported by its old one

renames.install()
