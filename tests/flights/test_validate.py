"""What the task leaves behind when the data break their contract."""

from pathlib import Path

import pandas as pd
import pytest

from mlnb.notebooks.execute import execute
from mlnb.project.errors import NotebookError
from mlnb.project.settings import find_root

ROOT = find_root(Path(__file__).parent)


def test_a_broken_year_fails_the_task_and_keeps_its_rows(flights, weather, tmp_path):
    given = {"flights": str(tmp_path / "flights.parquet"), "weather": str(tmp_path / "weather.parquet")}
    flights.head(5000).assign(distance=[-5.0, -6.0, *flights["distance"][2:5000]]).to_parquet(
        given["flights"], index=False
    )
    weather.to_parquet(given["weather"], index=False)
    parameters = {"upstream": {"ingest": given}, "rejected": str(tmp_path / "rejected")}
    parameters["product"] = {"report": str(tmp_path / "report.json")}
    with pytest.raises(NotebookError) as e:
        execute(ROOT / "nbs/flights/01_validate.ipynb", tmp_path / "run.ipynb", parameters, cwd=ROOT)
    message = str(e.value)
    assert "flights, 5000 rows, breaks its contract: column 'distance': in_range(10, 6000) fails in 2 rows" in message
    assert f"The 2 offending rows are in {tmp_path}/rejected/flights.parquet" in message
    assert pd.read_parquet(tmp_path / "rejected" / "flights.parquet")["distance"].tolist() == [-5.0, -6.0]
    assert not (tmp_path / "report.json").exists()
