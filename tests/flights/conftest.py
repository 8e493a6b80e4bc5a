import pytest

from mlnb.data.point_in_time import to_columns
from mlnb.flights.features import History
from mlnb.flights.ingest import read_raw, tidy_flights, tidy_weather


@pytest.fixture(scope="session")
def raw():
    return {name: read_raw(name) for name in ("flights", "weather", "airports")}


@pytest.fixture(scope="session")
def flights(raw):
    return tidy_flights(raw["flights"], raw["airports"])


@pytest.fixture(scope="session")
def weather(raw):
    return tidy_weather(raw["weather"])


@pytest.fixture(scope="session")
def history(flights, weather):
    return History(to_columns(flights), to_columns(weather))
