"""FastAPI with the model and nothing else: pydantic in and out, handlers on the event loop."""

import os

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, create_model
from speed.mlp import NAMES, THRESHOLD, Mlp, values_of

model = Mlp.load(os.environ["MODEL"])
app = FastAPI()
Row = create_model("Row", customer=(str, ...), **dict.fromkeys(NAMES, (float, ...)))


class Answer(BaseModel):
    probability: float
    decision: bool


@app.get("/readyz")
async def ready() -> bool:
    return True


@app.post("/predict")
async def predict(row: Row) -> Answer:
    p = float(model.probability(np.array([values_of(row)]))[0])
    return Answer(probability=p, decision=p >= THRESHOLD)


@app.post("/predict_rows")
async def predict_rows(rows: list[Row]) -> list[Answer]:
    found = model.probability(np.array([values_of(row) for row in rows])).tolist()
    return [Answer(probability=p, decision=p >= THRESHOLD) for p in found]
