"""MLServer's own runtime class and protocol (V2): a named input for each number."""

import os

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from speed.mlp import NAMES, THRESHOLD, Mlp


class Peer(MLModel):
    async def load(self) -> bool:
        self.model = Mlp.load(os.environ["MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        columns = {i.name: NumpyCodec.decode_input(i) for i in payload.inputs if i.name != "customer"}
        p = self.model.probability(np.concatenate([columns[name].reshape(-1, 1) for name in NAMES], axis=1))
        outputs = [NumpyCodec.encode_output("probability", p), NumpyCodec.encode_output("decision", p >= THRESHOLD)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
