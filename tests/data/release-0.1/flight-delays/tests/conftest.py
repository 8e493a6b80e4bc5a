import pytest

from mlnb.data.context import to_columns
from flight_delays.features import History
from flight_delays.ingest import read_raw, tidy_flights, tidy_weather


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
