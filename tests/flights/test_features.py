import json

import numpy as np
import pandas as pd
import pytest

from mlnb.data.point_in_time import FeatureSnapshot, FeatureView, PointInTimeFeatures, floor_to_interval, to_columns
from mlnb.data.snapshot_store import SnapshotStore
from mlnb.flights.features import (
    CATEGORICAL,
    LEAKY_COLUMNS,
    NUMERIC,
    REQUEST,
    History,
    check_no_leakage,
    context_features,
    decision_time,
    feature_table,
    request_features,
)
from mlnb.flights.snapshots import chosen_as_of_times, write_snapshots
from mlnb.project.errors import ContractError, ModelError

# a calm day, a blizzard, both changes of the clocks, a summer storm, the last evening of the year
MOMENTS = [
    "2013-01-01T12:00", "2013-02-09T02:15", "2013-03-10T06:45", "2013-03-10T07:00", "2013-05-23T21:30",
    "2013-07-01T22:00", "2013-09-12T23:45", "2013-11-03T05:30", "2013-11-03T06:00", "2013-12-31T23:30",
]  # fmt: skip


@pytest.fixture(scope="module")
def table(history):
    return feature_table(history)


def same(a, b):
    "Bit for bit; the width of text does not count"
    assert a.keys() == b.keys()
    for name in a:
        left, right = (part[name].tobytes() if part[name].dtype.kind == "f" else part[name].tolist() for part in (a, b))
        assert left == right, name


def rows_at(history, as_of):
    "The flights that are decided within the quarter of an hour after `as_of`"
    matches = floor_to_interval(decision_time(history.flights["scheduled_departure"])) == as_of
    rows = {name: history.flights[name][matches] for name in REQUEST}
    return rows | {"moment": np.full(matches.sum(), as_of)}


# as it was known


def cut_off(flights, weather, as_of):
    "The files as they could have been on the disk at `as_of`: written here once more, independent of the library"
    t = pd.Timestamp(as_of)
    f, w = flights.copy(), weather[weather["observed"] + pd.Timedelta(hours=1) <= t]
    in_the_air = ~(f["departure"] <= t)
    f.loc[in_the_air, ["departure", "departure_delay"]] = [pd.NaT, np.nan]
    open_ = ~(f["label_time"] <= t)
    f["disrupted"] = f["disrupted"].astype(float).mask(open_)
    f.loc[open_, ["arrival", "label_time"]] = pd.NaT
    f.loc[open_, "arrival_delay"] = np.nan
    return History(to_columns(f.drop(columns=["cancelled", "diverted"])), to_columns(w))


@pytest.mark.parametrize("as_of", MOMENTS)
def test_no_feature_of_any_key_knows_the_future(flights, weather, history, as_of):
    as_of = np.datetime64(as_of, "s")
    then = cut_off(flights, weather, as_of)
    assert context_features.snapshot(then, as_of).to_bytes() == context_features.snapshot(history, as_of).to_bytes()
    rows = rows_at(history, as_of)
    if len(rows["moment"]):
        same(context_features(then, rows), context_features(history, rows))


@pytest.mark.parametrize("leak", ["labels", "done", "delays"])
def test_that_test_notices_a_view_that_looks_ahead(flights, weather, history, leak):
    as_of = np.datetime64("2013-05-23T21:30", "s")

    def peek(history, pairs):
        return {"peek": getattr(history, leak)("origin").window(pairs, -3600, 900)[1].astype(float)}

    leaky = PointInTimeFeatures(
        [FeatureView("origin", ("origin",), ("peek",), peek, lambda history: history.distinct_keys("origin"))]
    )
    then = cut_off(flights, weather, as_of)
    assert leaky.snapshot(then, as_of).to_bytes() != leaky.snapshot(history, as_of).to_bytes()


def test_a_cancelled_flight_waits_until_its_cancellation_is_known(flights, history):
    gone = flights[flights["cancelled"] & (flights["origin"] == "LGA")].iloc[500]
    other = {
        name: column[history.flights["label_time"] != gone["label_time"]] for name, column in history.flights.items()
    }
    soon = pd.Timedelta(minutes=16)
    pairs = {
        "origin": np.array(["LGA"] * 2),
        "moment": floor_to_interval([gone["scheduled_departure"] + soon, gone["label_time"] + soon]),
    }
    with_it = context_features.views[0].evaluate(history, pairs)["backlog"]
    without = context_features.views[0].evaluate(History(other, history.readings), pairs)["backlog"]
    assert with_it[0] - without[0] >= 1 and with_it[1] - without[1] == 0


# what they mean, once more and slowly


@pytest.mark.parametrize("row", [1_000, 60_000, 123_456, 200_000, 336_000])
def test_features_are_what_their_names_say(flights, weather, table, row):
    f, t = table.iloc[row], pd.Timestamp(table.iloc[row]["moment"])
    hours = lambda n: pd.Timedelta(hours=n)
    at_origin = flights[flights["origin"] == f["origin"]]

    def left(rows, window):
        return rows[rows["departure"].between(t - hours(window), t)]["departure_delay"].clip(-30, 300)

    def rate(rows, window, weight=20):
        known = rows[rows["label_time"].between(t - hours(window), t)]["disrupted"]
        return (known.sum() + weight * 0.25) / (len(known) + weight)

    of = lambda **keys: flights[np.logical_and.reduce([flights[name] == value for name, value in keys.items()])]
    planned = at_origin["scheduled_departure"]
    seen = weather[(weather["origin"] == f["origin"]) & (weather["observed"] + hours(1) <= t)].sort_values("observed")
    expected = {
        "origin_departures_2h": len(left(at_origin, 2)),
        "origin_delay_2h": left(at_origin, 2).mean(),
        "origin_delay_6h": left(at_origin, 6).mean(),
        "origin_carrier_delay_4h": left(of(origin=f["origin"], carrier=f["carrier"]), 4).mean(),
        "dest_delay_4h": left(of(dest=f["dest"]), 4).mean(),
        "origin_disrupted_24h": rate(at_origin, 24),
        "origin_disrupted_7d": rate(at_origin, 168),
        "carrier_disrupted_24h": rate(of(carrier=f["carrier"]), 24),
        "carrier_disrupted_7d": rate(of(carrier=f["carrier"]), 168),
        "dest_disrupted_24h": rate(of(dest=f["dest"]), 24, 5),
        "dest_disrupted_14d": rate(of(dest=f["dest"]), 336),
        "flight_disrupted_21d": rate(of(carrier=f["carrier"], flight=f["flight"], dest=f["dest"]), 504, 5),
        "scheduled_load": planned.between(t + hours(1), t + hours(3.25)).sum(),
        "backlog": (planned <= t).sum() - (at_origin["departure"].fillna(at_origin["label_time"]) <= t).sum(),
        "temperature": seen["temperature"].iloc[-1],
        "pressure": seen["pressure"].iloc[-1],
        "precipitation_6h": seen["precipitation"].iloc[-6:].sum(),
        "pressure_change_6h": seen["pressure"].iloc[-1] - seen["pressure"].iloc[-7],
    }
    fresh = t - seen["observed"].iloc[-1] <= hours(7)
    for name, value in expected.items():
        if not fresh and name in ("temperature", "pressure", "precipitation_6h", "pressure_change_6h"):
            value = np.nan
        assert f[name] == pytest.approx(value, nan_ok=True), name


def test_the_moment_is_the_last_full_quarter_before_the_decision(table):
    before = table["decision_time"] - table["moment"]
    assert (table["scheduled_departure"] - table["decision_time"] == pd.Timedelta(hours=2)).all()
    assert before.min() >= pd.Timedelta(0) and before.max() < pd.Timedelta(minutes=15)


def test_the_table_has_a_row_a_flight_and_every_feature(table, raw):
    assert len(table) == 336_776 and not table.isna().all().any()
    other_columns = {"decision_time", "moment", "month", "disrupted", "label_time"}
    assert {*CATEGORICAL, *NUMERIC, *REQUEST, *other_columns} == set(table.columns)
    months = raw["flights"].groupby("month").size()
    assert table.groupby("month").size().to_dict() == months.to_dict()
    always = ["backlog", "scheduled_load", "flight_disrupted_21d", "origin_disrupted_24h", *CATEGORICAL]
    assert not table[always].isna().any().any() and not np.isinf(table[list(NUMERIC)].to_numpy()).any()


# training and serving


def test_batch_equals_the_snapshot_of_every_moment_bit_for_bit(history, table):
    days = np.array(["2013-03-10", "2013-07-01", "2013-12-31"], "datetime64[s]")
    as_of_times = (days[:, None] + np.arange(96) * 900).ravel()
    frame = table[table["moment"].isin(as_of_times)]
    rows = to_columns(frame)
    checked = 0
    for snapshot in context_features.snapshots(history, as_of_times):
        matches = rows["moment"] == snapshot.as_of
        asked = {name: rows[name][matches] for name in context_features.keys}
        expected = {name: rows[name][matches] for name in context_features.features}
        data = snapshot.to_bytes()
        assert len(data) < 100_000
        for served in (snapshot, FeatureSnapshot.from_bytes(data)):
            same(served.lookup(asked), expected)
        checked += matches.sum()
    assert checked == len(frame) > 2000


def test_an_unknown_key_has_the_defaults(history):
    as_of = np.datetime64("2013-07-01T22:00", "s")
    keys = {
        "origin": np.array(["XXX"]),
        "carrier": np.array(["??"]),
        "dest": np.array(["YYY"]),
        "flight": np.array([9999.0]),
    }
    served = context_features.snapshot(history, as_of).lookup(keys)
    same(served, context_features(history, keys | {"moment": np.array([as_of])}))
    assert all(served[name][0] == 0.25 for name in served if "disrupted" in name)
    assert all(np.isnan(served[name][0]) for name in served if "delay" in name) and served["backlog"][0] == 0


def test_one_request_equals_the_batch_around_every_change_of_the_clocks(history):
    f, leaves = history.flights, history.flights["scheduled_departure"]
    near = np.zeros(len(leaves), bool)
    for change in ("2013-03-10T07:00", "2013-11-03T06:00"):
        near |= np.abs((leaves - np.datetime64(change, "s")).astype(int)) < 6 * 3600
    near |= np.random.default_rng(0).random(len(leaves)) < 0.001
    batch = request_features({name: f[name] for name in REQUEST})
    for i in np.flatnonzero(near):
        same(
            request_features({name: f[name][i : i + 1] for name in REQUEST}),
            {name: v[i : i + 1] for name, v in batch.items()},
        )


def test_local_times_are_those_of_the_files(raw, history):
    shown = request_features({name: history.flights[name] for name in REQUEST})
    r = raw["flights"]
    r = r.assign(leaves=pd.to_datetime(r["time_hour"]).dt.tz_localize(None) + pd.to_timedelta(r["minute"], unit="min"))
    r = r.sort_values(["leaves", "origin", "carrier", "flight"], kind="stable")
    assert (shown["hour"].astype(int) == r["hour"].to_numpy()).all()
    assert (shown["minute_of_day"] == (r["hour"] * 60 + r["minute"]).to_numpy()).all()
    assert (shown["day_of_week"] == pd.to_datetime(r[["year", "month", "day"]]).dt.strftime("%a").to_numpy()).all()


CHANGES = [
    "2024-03-10T06:59:59",
    "2024-03-10T07:00:00",
    "2024-11-03T05:59:59",
    "2024-11-03T06:00:00",
    "1975-02-23T07:00:00",
]


@pytest.mark.parametrize("leap", CHANGES)
def test_local_time_at_a_change_of_the_clocks(leap):
    request = {name: np.array(["x"]) for name in ("carrier", "origin", "dest")} | {"distance": np.array([1.0])}
    request |= {name: np.array([leap], "datetime64[s]") for name in ("scheduled_departure", "scheduled_arrival")}
    local = pd.Timestamp(leap, tz="UTC").tz_convert("America/New_York")
    shown = request_features(request)
    assert shown["minute_of_day"][0] == local.hour * 60 + local.minute and shown["day_of_week"][0] == local.strftime(
        "%a"
    )


# leaks


TOO_LATE = [
    "tailnum",
    "dep_delay",
    "air_time",
    "arr_time",
    "dep_time",
    "arr_delay",
    "departure_delay",
    "disrupted",
    "label_time",
]


@pytest.mark.parametrize("name", TOO_LATE)
def test_an_input_that_is_known_too_late_is_refused_by_name(name):
    with pytest.raises(ModelError, match=f"input '{name}' is known only after the decision"):
        check_no_leakage([*CATEGORICAL, name, *NUMERIC])


def test_the_features_themselves_are_no_leaks():
    check_no_leakage([*CATEGORICAL, *NUMERIC])
    assert not {*CATEGORICAL, *NUMERIC} & set(LEAKY_COLUMNS)


# the scheduled task


def test_moments_of_the_context_task(history):
    assert chosen_as_of_times(history, "2013-07-04T12:20", 2).astype(str).tolist() == [
        "2013-07-04T12:00:00",
        "2013-07-04T12:15:00",
    ]
    assert chosen_as_of_times(history)[0] == floor_to_interval(
        decision_time(history.flights["scheduled_departure"]).max()
    )
    with pytest.raises(ContractError, match="'as_of' has value 'noon'; write a time in UTC such as"):
        chosen_as_of_times(history, "noon")
    with pytest.raises(ContractError, match="'count' has value 0"):
        chosen_as_of_times(history, count=0)


def test_snapshots_are_written_small_and_served(history, tmp_path):
    store = SnapshotStore(tmp_path / "context", listing_ttl=0)
    as_of_times = chosen_as_of_times(history, "2013-08-01T12:00", 12)
    written = write_snapshots(history, as_of_times, store)
    json.dumps(written)
    assert [w["moment"] for w in written] == as_of_times.astype(str).tolist() and all(
        w["bytes"] < 100_000 and w["rows"] > 100 for w in written
    )
    rows = rows_at(history, as_of_times[-1])
    assert len(rows["moment"]) > 5
    served = store.newest(as_of_times[-1] + 60).lookup(rows)
    same(served, context_features(history, rows))
