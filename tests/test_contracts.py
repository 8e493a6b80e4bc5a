import subprocess
import sys

import numpy as np
import pandas as pd
import pandera.pandas as pa
import pytest

from mlnb.data.contracts import validate
from mlnb.project.errors import ContractError


def schema(**extra):
    columns = {
        "origin": pa.Column("str", pa.Check.isin(["EWR", "JFK"])),
        "flight": pa.Column("int64", pa.Check.gt(0)),
        "delay": pa.Column(float, pa.Check.in_range(-60, 2000), nullable=True),
        "distance": pa.Column(float),
    }
    rule = pa.Check(lambda d: d["distance"] > d["flight"] / 100, name="far enough", error="far enough")
    return pa.DataFrameSchema(columns, checks=[rule], unique=["origin", "flight"], name="flights", **extra)


def frame():
    return pd.DataFrame({
        "origin": ["EWR", "JFK", "EWR", "JFK"],
        "flight": [1, 2, 3, 4],
        "delay": [0.0, np.nan, 5.0, -3.0],
        "distance": [100.0, 200.0, 300.0, 400.0],
    })


def broken(table, tmp_path, **extra):
    with pytest.raises(ContractError) as e:
        validate(table, schema(**extra), tmp_path / "deep" / "rejected.parquet")
    return str(e.value)


def rejected(tmp_path):
    return pd.read_parquet(tmp_path / "deep" / "rejected.parquet")


def test_good_data_are_counted_and_an_old_file_of_rejected_rows_is_removed(tmp_path):
    old = tmp_path / "rejected.parquet"
    old.write_text("old")
    report = validate(frame(), schema(), old)
    assert report == {"table": "flights", "rows": 4, "columns": 4, "checks": 12} and not old.exists()


def test_a_value_out_of_range(tmp_path):
    message = broken(frame().assign(delay=[0.0, 2001.0, -61.0, 0.0]), tmp_path)
    assert (
        "flights, 4 rows, breaks its contract: column 'delay': in_range(-60, 2000) fails in 2 rows, such as 2001.0"
        in message
    )
    assert f"The 2 offending rows are in {tmp_path}/deep/rejected.parquet" in message
    assert rejected(tmp_path)["delay"].tolist() == [2001.0, -61.0]


def test_an_unknown_text(tmp_path):
    message = broken(frame().assign(origin=["EWR", "BOS", "EWR", "JFK"]), tmp_path)
    assert "column 'origin': isin(['EWR', 'JFK']) fails in 1 row, such as 'BOS'" in message


def test_a_missing_value(tmp_path):
    assert "column 'distance' is missing in 1 row" in broken(frame().assign(distance=[1, 2, np.nan, 4]), tmp_path)


def test_a_missing_column_has_no_rows(tmp_path):
    message = broken(frame().drop(columns=["delay"]), tmp_path)
    assert message == "flights, 4 rows, breaks its contract: column 'delay' is missing"
    assert not (tmp_path / "deep").exists()


def test_a_column_too_many(tmp_path):
    assert "column 'tailnum' is not in the contract" in broken(frame().assign(tailnum="N1"), tmp_path, strict=True)


@pytest.mark.parametrize(
    "column, values, kind", [("distance", list("abcd"), "str"), ("flight", [1.0, 2.0, 3.0, 4.0], "float64")]
)
def test_a_wrong_type_offends_no_single_row(tmp_path, column, values, kind):
    message = broken(frame().assign(**{column: values}), tmp_path)
    assert f"column '{column}' has type {kind}, not {'float64' if column == 'distance' else 'int64'}" in message


def test_repeated_keys(tmp_path):
    message = broken(frame().assign(origin=["EWR", "EWR", "EWR", "JFK"], flight=[1, 1, 3, 4]), tmp_path)
    assert "columns 'origin', 'flight' together repeat in 2 rows" in message and len(rejected(tmp_path)) == 2


def test_a_rule_about_several_columns(tmp_path):
    message = broken(frame().assign(distance=[100.0, 0.0, 300.0, 0.0]), tmp_path)
    assert "'far enough' does not hold in 2 rows" in message


def test_everything_that_is_wrong_is_told_at_once_and_each_row_says_what_it_violates(tmp_path):
    table = (
        frame()
        .assign(origin=["BOS", "JFK", "EWR", "JFK"], delay=[9999.0, 0.0, 0.0, 0.0])
        .set_index(np.array([7, 7, 8, 9]))
    )
    message = broken(table, tmp_path)
    assert message.count(";") == 1 and "'origin'" in message and "'delay'" in message
    (row,) = rejected(tmp_path).to_dict("records")
    assert row["violates"] == "isin(['EWR', 'JFK']); in_range(-60, 2000)"


def test_an_empty_table_is_a_table(tmp_path):
    assert validate(frame().iloc[:0], schema(), tmp_path / "rejected.parquet")["rows"] == 0


def test_pandera_is_not_imported_before_it_is_needed():
    code = "import sys, mlnb.data.contracts, mlnb.flights.validate; "
    code += "sys.exit('pandera' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
