"""The model as MLflow's pyfunc; run with a folder it is saved there for `mlflow models serve`."""

import os
import sys

import mlflow
import pandas as pd
from mlflow.models import ModelSignature, set_model
from mlflow.types import ColSpec, Schema
from speed.mlp import NAMES, THRESHOLD, Mlp


class Peer(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.model = Mlp.load(os.environ["MODEL"])

    def predict(self, context, model_input: pd.DataFrame):
        p = self.model.probability(model_input[list(NAMES)].to_numpy())
        return pd.DataFrame({"probability": p, "decision": p >= THRESHOLD})


set_model(Peer())

if __name__ == "__main__":
    schema = Schema([ColSpec("string", "customer"), *(ColSpec("double", name) for name in NAMES)])
    signature = ModelSignature(schema, Schema([ColSpec("double", "probability"), ColSpec("boolean", "decision")]))
    mlflow.pyfunc.save_model(sys.argv[1], python_model=__file__, signature=signature, pip_requirements=["mlflow"])
