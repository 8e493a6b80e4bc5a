import numpy as np

from mlnb.models.hooks import Model


class Scorecard(Model):
    def predict(self, features):
        return 1 / (1 + np.exp(3 - features["age"] / 20 - features["income"] / 1e5))
