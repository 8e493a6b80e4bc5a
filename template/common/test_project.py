"""Holds for any project: keep it when you replace the other tests by your own."""

from pathlib import Path

from mlnb.models.bundle import Bundle
from mlnb.project.settings import load_settings


def test_the_bundle_computes_its_own_samples_again():
    settings = load_settings(Path(__file__).parent)
    assert Bundle.load(settings.path(settings.bundle)).self_test() > 0
