"""Segments, calendar parts and batches: each row once, the same figures as of the rows themselves."""

import datetime as dt

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlnb.data.calendar_fields import add_calendar_fields, calendar_fields
from mlnb.data.profiler import Profiler, profile_parquet
from mlnb.data.profiles import Profile
from mlnb.data.segments import OTHER, merged_segments, segments
from mlnb.project.errors import ProfileError


def table(rows=3000, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    origin = rng.choice(["EWR", "JFK", "LGA"], rows)
    frame = pd.DataFrame({"delay": rng.gamma(2, 10, rows), "origin": origin, "n": rng.integers(0, 4, rows)})
    frame["n"] = frame["n"].where(frame["n"] > 0)
    frame.loc[::7, "origin"] = None
    frame["day"] = pd.Timestamp("2013-07-01") + pd.to_timedelta(rng.integers(0, 3, rows), "D")
    return frame


def bytes_of(profiles) -> dict:
    return {key: profile.to_bytes() for key, profile in profiles.items()}


FORMS = {
    "frame": lambda f: f,
    "categories": lambda f: f.astype({"origin": "category"}),
    "nullable": lambda f: f.convert_dtypes(),
    "an odd index": lambda f: f.set_axis(np.arange(len(f))[::-1] % 17),
    "arrow": lambda f: pa.Table.from_pandas(f, preserve_index=False),
    "columns": lambda f: {n: f[n].to_numpy(object if n == "origin" else None) for n in f},
    "lists": lambda f: {n: f[n].to_list() for n in f},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", [["origin"], ["origin", "n"], ["day"]])
def test_a_segment_is_the_profile_of_its_rows(form, by):
    data = FORMS[form](table())
    plain = FORMS["frame"](table())
    profiles = segments(data, by)
    expected = {key if isinstance(key, tuple) else (key,): rows for key, rows in plain.groupby(by, dropna=False)}
    expected = {tuple(None if pd.isna(v) else v for v in key): rows for key, rows in expected.items()}
    assert {k: p.rows for k, p in profiles.items()} == {k: len(rows) for k, rows in expected.items()}
    if form == "frame":
        assert bytes_of(profiles) == {key: Profile.of(rows).to_bytes() for key, rows in expected.items()}
    for key, rows in expected.items():
        assert np.isclose(profiles[key].columns["delay"].mean, rows["delay"].mean())


def test_many_values_are_bounded_and_no_row_is_lost():
    frame = pd.DataFrame({"id": np.arange(50_000) % 20_011, "x": 1.0})
    profiles = segments(frame, ["id"], limit=10)
    assert (
        len(profiles) == 11
        and profiles[(OTHER,)].rows == 50_000 - 30
        and sum(p.rows for p in profiles.values()) == 50_000
    )
    assert list(profiles)[:2] == [(0,), (1,)]


def test_segments_of_parts_merge():
    parts = [segments(table(seed=i), ["origin"]) for i in range(5)]
    whole = segments(pd.concat([table(seed=i) for i in range(5)]), ["origin"])
    both = merged_segments(parts)
    assert {k: p.rows for k, p in both.items()} == {k: p.rows for k, p in whole.items()} and list(both) == list(whole)
    assert merged_segments([]) == {} and merged_segments([parts[0], {}]).keys() == parts[0].keys()
    few = merged_segments(parts, limit=2)
    assert len(few) == 3 and sum(p.rows for p in few.values()) == 15_000 and (OTHER,) in few


def test_odd_segments():
    assert segments(table().iloc[:0], ["origin"]) == {}
    lists = segments({"x": [[1], [1], [2]], "y": [1, 2, 3]}, ["x"])
    assert [p.rows for p in lists.values()] == [2, 1]
    assert list(segments({"x": [True, None, True]}, ["x"])) == [(True,), (None,)]
    assert list(segments({"x": ["a" * 10**6, "b", "b"]}, ["x"])) == [("b",), ("a" * 10**6,)]
    for by, message in ((["orign"], "did you mean 'origin'"), ([], "are none")):
        with pytest.raises(ProfileError, match=message):
            segments(table(), by)


# --- calendar parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(pd.to_datetime(["2013-07-06 23:30", None])),
        pd.Series(pd.to_datetime(["2013-07-06 23:30", None])).dt.tz_localize("UTC").dt.tz_convert("America/New_York"),
        np.array(["2013-07-06T23:30", "NaT"], "datetime64[ms]"),
        pa.array([dt.datetime(2013, 7, 6, 23, 30), None]),
        pa.chunked_array([[dt.datetime(2013, 7, 6, 23, 30)], [None]], pa.timestamp("us", "UTC")),
        [dt.datetime(2013, 7, 6, 23, 30), None],
        ["2013-07-06T19:30:00-04:00", None],
    ],
)
def test_calendar_parts_of_any_times(values):
    parts = calendar_fields(values, "t")
    assert [list(parts[f"t.{n}"]) for n in ("hour", "weekday", "month")] == [
        [23, np.ma.masked],
        ["Sat", None],
        [7, np.ma.masked],
    ]


def test_calendar_before_1970_and_what_is_no_time():
    assert calendar_fields(np.array(["1969-12-29T01:00"], "datetime64[s]"))["time.weekday"].tolist() == ["Mon"]
    for data, message in (
        ({"t": [1, 2]}, "holds no times"),
        ({"t": ["x"]}, "holds no times"),
        ({"time": [None]}, "no column 't'"),
    ):
        with pytest.raises(ProfileError, match=message):
            add_calendar_fields(data, "t")
    assert Profile.of(add_calendar_fields(table(), "day")).columns["day.weekday"].frequent()[0].keys() == {
        "Mon",
        "Tue",
        "Wed",
    }


# --- batches ----------------------------------------------------------------------------------------------------------


def same_figures(one: Profile, other: Profile):
    assert list(one.columns) == list(other.columns)
    for name, column in one.columns.items():
        theirs = other.columns[name]
        types = [{name: rows for name, rows in c.types.items() if rows} for c in (column, theirs)]
        assert (column.count, column.missing, types[0]) == (theirs.count, theirs.missing, types[1]), name
        figures = [[c.mean, c.std, c.min, c.max] for c in (column, theirs)]
        assert np.allclose(*figures, equal_nan=True), name
        assert column.frequent() == theirs.frequent()


def test_rows_frames_and_files_say_the_same(tmp_path):
    frame, profiler = table(), Profiler()
    frame["n"] = frame["n"].astype("Int64")
    for row in frame.iloc[:1000].astype(object).where(frame.iloc[:1000].notna(), None).to_dict("records"):
        profiler.add(row)
    for start in range(1000, 3000, 50):
        profiler.add(frame.iloc[start : start + 50])
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=128)
    same_figures(profiler.profile(), Profile.of(frame))
    same_figures(profile_parquet(tmp_path / "a.parquet"), Profile.of(frame))
    assert list(profile_parquet(tmp_path / "a.parquet", ["n"]).columns) == ["n"]


def test_a_profiler_takes_nothing_of_what_it_refuses():
    profiler = Profiler()
    profiler.add({"a": 1})
    for wrong in ({1: 2}, {"a": np.zeros((2, 2)), "b": np.zeros(3)}, 3, [1]):
        with pytest.raises(ProfileError):
            profiler.add(wrong)
    profiler.add({"a": float("inf"), "b": "x" * 10**6})
    profile = profiler.profile()
    assert (profile.rows, profile.columns["a"].infinite, profile.columns["b"].count) == (
        2,
        1,
        2,
    ) and Profiler().profile().rows == 0


def test_a_folder_of_files_and_files_that_are_none(tmp_path):
    for i in range(3):
        table(seed=i).to_parquet(tmp_path / f"{i}.parquet")
    assert profile_parquet(tmp_path).rows == 9000
    (tmp_path / "0.parquet").write_bytes(b"PAR1 and no more")
    torn = tmp_path / "torn.parquet"
    pq.write_table(pa.table({"x": np.random.default_rng(0).normal(size=10_000)}), torn)
    data = bytearray(torn.read_bytes())
    data[4:60] = b"\xff" * 56
    torn.write_bytes(data)
    for path, message in (
        (tmp_path / "0.parquet", "not a readable Parquet file"),
        (tmp_path / "no", "does not exist"),
        (torn, "is damaged"),
    ):
        with pytest.raises(ProfileError, match=message):
            profile_parquet(path)
    with pytest.raises(ProfileError, match="did you mean 'delay'"):
        profile_parquet(tmp_path / "1.parquet", ["dely"])


@pytest.mark.parametrize("first", [0, 1])
def test_files_of_a_folder_were_written_at_different_times(tmp_path, first):
    old = pa.table(
        {"n": [1, 2], "empty": pa.nulls(2), "kind": pa.array(["a", "b"]).dictionary_encode(), "gone": [1, 2]}
    )
    new = pa.table({"n": [1.5, 3], "empty": ["x", "y"], "kind": ["b", "c"], "later": [5, 6]})
    for name, one in zip(("0.parquet", "1.parquet")[:: 1 if first else -1], (old, new), strict=True):
        pq.write_table(one, tmp_path / name)
    columns = profile_parquet(tmp_path).columns
    counts = {name: (column.count, column.missing) for name, column in columns.items()}
    assert counts == {"n": (4, 0), "empty": (4, 2), "kind": (4, 0), "gone": (4, 2), "later": (4, 2)}
    assert (columns["n"].min, columns["n"].max, columns["later"].max) == (1, 3, 6)
    assert columns["kind"].frequent()[0] == {"a": 1, "b": 2, "c": 1} and list(
        profile_parquet(tmp_path, ["later"]).columns
    ) == ["later"]
    pq.write_table(pa.table({"n": ["text"]}), tmp_path / "2.parquet")
    with pytest.raises(ProfileError, match="Field n has incompatible types"):
        profile_parquet(tmp_path)
