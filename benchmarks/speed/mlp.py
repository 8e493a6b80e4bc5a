"""The model that every server of the comparison answers with: 20 numbers, two hidden layers, one probability, in
numpy alone."""

from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import numpy as np

NAMES = tuple(f"x{i}" for i in range(20))
WIDTH = 64
THRESHOLD = 0.5
values_of = attrgetter(*NAMES)  # the numbers of an object that has them as attributes


class Mlp:
    """A perceptron of two hidden layers; it does the same with a row as with a thousand."""

    FILE = "weights.npz"

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights

    @classmethod
    def random(cls, seed: int) -> "Mlp":
        """An untrained one."""
        draw, sizes = np.random.default_rng(seed), (len(NAMES), WIDTH, WIDTH, 1)
        return cls({f"w{i}": draw.normal(0, n**-0.5, (n, m)) for i, (n, m) in enumerate(pairwise(sizes))})

    def probability(self, x: np.ndarray) -> np.ndarray:
        """The probability (n,) of each row of x (n, 20)."""
        hidden = np.tanh(np.tanh(x @ self.weights["w0"]) @ self.weights["w1"])
        return 1 / (1 + np.exp(-(hidden @ self.weights["w2"])[:, 0]))

    def predict(self, features: dict[str, np.ndarray]) -> np.ndarray:
        """As a bundle asks for it: columns (n,) in, probabilities (n,) out."""
        return self.probability(np.stack([features[name] for name in NAMES], axis=1))

    def save(self, folder: str | Path):
        Path(folder).mkdir(parents=True)
        np.savez(Path(folder, self.FILE), **self.weights)

    @classmethod
    def load(cls, folder: str | Path) -> "Mlp":
        with np.load(Path(folder, cls.FILE), allow_pickle=False) as stored:
            return cls(dict(stored))


def requests(count: int) -> list[dict]:
    """Made-up rows: whose they are, and the 20 numbers."""
    numbers = np.random.default_rng(0).normal(size=(count, len(NAMES))).round(4)
    return [{"customer": f"c{i:06}"} | dict(zip(NAMES, row, strict=True)) for i, row in enumerate(numbers.tolist())]
