"""LitServe with one worker and its fast queue: python litserve_server.py PORT"""

import os
import sys

import litserve
import numpy as np
from speed.mlp import NAMES, THRESHOLD, Mlp


class Peer(litserve.LitAPI):
    def setup(self, device):
        self.model = Mlp.load(os.environ["MODEL"])

    def decode_request(self, request):
        return np.array([[request[name] for name in NAMES]])

    def predict(self, x):
        return float(self.model.probability(x)[0])

    def encode_response(self, p):
        return {"probability": p, "decision": p >= THRESHOLD}


if __name__ == "__main__":
    server = litserve.LitServer(Peer(), accelerator="cpu", workers_per_device=1, fast_queue=True)
    quiet = {"log_level": "warning", "access_log": False, "generate_client_file": False}
    server.run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, **quiet)
