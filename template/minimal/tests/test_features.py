import numpy as np

from PROJECT_PACKAGE.features import FIELDS, features, read_table

NAMES = {field.name for field in FIELDS}


def test_the_table_has_every_field_and_both_labels():
    table = read_table()
    assert {*NAMES, "malignant"} == {*table} and table.notna().all(axis=None)
    assert set(table["malignant"]) == {0, 1}


def test_a_row_has_the_same_features_alone_and_among_others():
    columns = {name: np.array([0.5, 2.0, 3.0]) for name in NAMES}
    together, alone = features(columns), features({name: column[1:2] for name, column in columns.items()})
    assert all(np.array_equal(column[1:2], alone[name]) for name, column in together.items())
