"""A stock BentoML endpoint: one worker, a pydantic row in, a pydantic answer out."""

import os

import bentoml
import numpy as np
from pydantic import BaseModel, create_model
from speed.mlp import NAMES, THRESHOLD, Mlp, values_of

Row = create_model("Row", customer=(str, ...), **dict.fromkeys(NAMES, (float, ...)))


class Answer(BaseModel):
    probability: float
    decision: bool


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Peer:
    def __init__(self):
        self.model = Mlp.load(os.environ["MODEL"])

    @bentoml.api
    def predict(self, row: Row, /) -> Answer:
        p = float(self.model.probability(np.array([values_of(row)]))[0])
        return Answer(probability=p, decision=p >= THRESHOLD)
