import json
from pathlib import Path

import numpy as np
import torch

from PROJECT_PACKAGE.network import CLASSES, SIZE, DigitNetwork, features, to_png

ROOT = Path(__file__).parents[1]


def test_an_image_is_the_same_after_its_file():
    pixels = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)
    files = np.array([to_png(pixels), to_png(1 - pixels)], dtype=object)
    assert np.allclose(features({"image": files})["pixels"], [pixels, 1 - pixels], atol=1 / 255)


def test_the_network_scores_every_class():
    assert DigitNetwork()(torch.zeros(2, SIZE, SIZE)).shape == (2, len(CLASSES))


def test_the_network_is_better_than_the_nearest_mean_image():
    scores = json.loads((ROOT / "products/scores.json").read_text())
    assert scores["network"]["accuracy"] > scores["nearest mean image"]["accuracy"]
