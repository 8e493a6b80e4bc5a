import json
from pathlib import Path

from PROJECT_PACKAGE.messages import read_table

ROOT = Path(__file__).parents[1]


def test_every_message_has_a_topic():
    table = read_table(ROOT / "data/messages.csv")
    assert table["topic"].nunique() > 1 and table["message"].is_unique and table.notna().all(axis=None)


def test_the_model_is_better_than_the_most_frequent_topic():
    scores = json.loads((ROOT / "products/scores.json").read_text())
    assert scores["words and pairs"]["macro_f1"] > 2 * scores["most frequent topic"]["macro_f1"]
