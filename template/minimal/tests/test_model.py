import numpy as np

from PROJECT_PACKAGE.model import NAMES, TumourModel, read_table


def test_the_table_has_every_field_and_both_labels():
    table = read_table()
    assert {*NAMES, "malignant"} == {*table} and table.notna().all(axis=None)
    assert set(table["malignant"]) == {0, 1}


def test_a_loaded_model_predicts_the_same(tmp_path):
    model = TumourModel(np.linspace(-1, 1, 1 + len(NAMES)))
    columns = {name: np.array([0.5, 2.0]) for name in NAMES}
    model.save(tmp_path)
    assert np.array_equal(TumourModel.load(tmp_path).predict(columns), model.predict(columns))
