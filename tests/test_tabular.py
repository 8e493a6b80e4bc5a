import json
import subprocess
import sys

import numpy as np
import pytest

from mlnb.models.tabular import Encoder, TabularPredictor, random_predictor
from mlnb.project.errors import ModelError

CATEGORICAL, NUMERIC = ("origin", "hour"), ("temperature", "wind", "load")


def table(n=2_000, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "origin": rng.choice(["EWR", "JFK", "LGA"], n),
        "hour": rng.integers(5, 23, n).astype(float),
        "temperature": np.where(rng.random(n) < 0.1, np.nan, rng.normal(50, 20, n)),
        "wind": rng.exponential(10, n),
        "load": rng.integers(0, 60, n),
    }


@pytest.fixture(scope="module")
def encoder():
    return Encoder.fit(table(), CATEGORICAL, NUMERIC)


@pytest.fixture(scope="module")
def predictor(encoder):
    return random_predictor(encoder, seed=3)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 63, 64, 65, 1000, 4095, 4096, 4097])
def test_any_number_of_rows_gives_the_same_bits(predictor, rows):
    columns = table(9_000, seed=1)
    together = predictor.predict(columns)
    for first in (0, 17, 9_000 - rows):
        part = predictor.predict({k: v[first : first + rows] for k, v in columns.items()})
        assert (part == together[first : first + rows]).all()


def test_no_rows_give_no_probabilities(predictor):
    assert predictor.predict({k: v[:0] for k, v in table().items()}).shape == (0,)


def test_probabilities_survive_the_folder_bit_for_bit(predictor, tmp_path):
    predictor.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["predictor.json", "weights.safetensors"]
    assert (TabularPredictor.load(tmp_path / "model").predict(table()) == predictor.predict(table())).all()


def test_predicting_imports_neither_torch_nor_pandas(predictor, tmp_path):
    predictor.save(tmp_path)
    code = f"""
import sys, numpy as np
from mlnb.models.tabular import TabularPredictor
row = {{"origin": np.array(["EWR"]), "hour": [6.0], "temperature": [50.0], "wind": [5.0], "load": [3]}}
print(TabularPredictor.load({str(tmp_path)!r}).predict(row)[0] == float(sys.argv[1]))
print([m for m in ("torch", "pandas", "sklearn", "mlflow") if m in sys.modules])
"""
    row = {"origin": ["EWR"], "hour": [6.0], "temperature": [50.0], "wind": [5.0], "load": [3]}
    args = [sys.executable, "-c", code, repr(float(predictor.predict(row)[0]))]
    assert subprocess.run(args, capture_output=True, text=True, check=True).stdout == "True\n[]\n"


def test_numpy_gives_what_torch_gives(encoder, predictor):
    import torch

    w = {k: torch.tensor(v, dtype=torch.float64) for k, v in predictor.weights.items()}
    codes, numbers = (torch.tensor(x) for x in encoder.encode(table()))
    x = torch.cat([w["embedding.weight"][codes].flatten(1), numbers], 1)
    for i in range(2):
        x = torch.nn.functional.linear(x, w[f"layers.{i}.linear.weight"], w[f"layers.{i}.linear.bias"])
        x = torch.nn.functional.layer_norm(x, x.shape[1:], w[f"layers.{i}.norm.weight"], w[f"layers.{i}.norm.bias"])
        x = torch.nn.functional.silu(x)
    p = torch.sigmoid(torch.nn.functional.linear(x, w["out.weight"], w["out.bias"]))[:, 0].numpy()
    assert np.abs(predictor.predict(table()) - p).max() < 1e-9


def test_new_and_missing_categories_are_one_unknown(predictor):
    row = {"origin": np.array(["XXX", "", "EWR"]), "hour": [np.nan, 99.0, 6.0]}
    row |= {"temperature": [50.0] * 3, "wind": [1.0] * 3, "load": [1] * 3}
    p = predictor.predict(row)
    assert p[0] == p[1] != p[2]


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300, np.nan])
def test_a_broken_sensor_gives_a_probability(predictor, value):
    columns = table(4) | {"wind": np.full(4, value)}
    p = predictor.predict(columns)
    assert ((p >= 0) & (p <= 1)).all()


def test_text_of_any_kind_is_the_same_category(encoder):
    columns = table(50)
    as_object = columns | {"origin": columns["origin"].astype(object)}
    as_wide = columns | {"origin": columns["origin"].astype("<U20")}
    codes = encoder.encode(columns)[0]
    assert (encoder.encode(as_object)[0] == codes).all() and (encoder.encode(as_wide)[0] == codes).all()


def test_state_is_plain_json(encoder):
    again = Encoder.from_json(json.loads(json.dumps(encoder.to_json(), allow_nan=False)))
    assert all((a == b).all() for a, b in zip(again.encode(table()), encoder.encode(table()), strict=True))


@pytest.mark.parametrize(("categorical", "numeric"), [((), NUMERIC), (CATEGORICAL, ())])
def test_either_kind_of_column_may_be_absent(categorical, numeric):
    p = random_predictor(Encoder.fit(table(), categorical, numeric)).predict(table())
    assert len(np.unique(p)) > 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": None}, "column 'temperature' is not in the data"),
        ({"temperature": np.full(2_000, np.nan)}, "column 'temperature' has no value in 2000 training rows"),
        ({"wind": np.r_[np.inf, np.ones(1_999)]}, "column 'wind' has 1 infinite values"),
        ({"wind": np.array(["calm"] * 2_000)}, "column 'wind' must hold numbers"),
        ({"wind": np.ones(3)}, "equal length"),
        ({"wind": np.ones((2_000, 2))}, "one-dimensional"),
    ],
)
def test_training_columns_that_cannot_be_used_are_named(change, words):
    columns = {k: v for k, v in (table() | change).items() if v is not None}
    with pytest.raises(ModelError, match=words):
        Encoder.fit(columns, CATEGORICAL, NUMERIC)


def test_an_empty_table_teaches_nothing():
    with pytest.raises(ModelError, match="there are no training rows"):
        Encoder.fit({k: v[:0] for k, v in table().items()}, CATEGORICAL, NUMERIC)


def test_a_category_that_changed_its_kind_is_named(predictor):
    with pytest.raises(ModelError, match="category 'hour' was numbers in training and is text now"):
        predictor.predict(table(3) | {"hour": np.array(["6", "7", "8"])})


def _without(folder, name):
    (folder / name).unlink()


def _torn(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])


def _emptied(folder, name):
    (folder / name).write_bytes(b"")


@pytest.mark.parametrize("name", TabularPredictor.FILES)
@pytest.mark.parametrize("damage", [_without, _torn, _emptied])
def test_a_damaged_model_is_refused(predictor, tmp_path, damage, name):
    predictor.save(tmp_path)
    damage(tmp_path, name)
    with pytest.raises(ModelError, match=r"holds no trained model|cannot be read"):
        TabularPredictor.load(tmp_path)


def test_weights_of_another_encoder_are_refused(predictor):
    other = Encoder.fit(table() | {"origin": np.array(["EWR", "JFK"] * 1_000)}, CATEGORICAL, NUMERIC)
    with pytest.raises(ModelError, match=r"embedding.weight \(\d+, 16\) instead of \(\d+, 16\)"):
        TabularPredictor(other, predictor.weights)
