"""Effect sizes, windows, and the hourly profiles of a real prediction log."""

import threading

import numpy as np
import pandas as pd
import pytest

from mlnb.data.profiles import ColumnProfile, Profile
from mlnb.monitoring import drift as d
from mlnb.monitoring import drift_sources as sources
from mlnb.monitoring import drift_statistics as statistics
from mlnb.project.errors import ProfileError
from mlnb.project.settings import Settings
from mlnb.serving.compactor import Compactor
from mlnb.serving.predictions import Prediction, PredictionLog


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(root=tmp_path, name="demo")


def one(values) -> ColumnProfile:
    return Profile.of(pd.DataFrame({"x": values})).columns["x"]


def drifted(reference, current) -> statistics.ColumnDrift:
    return statistics.column_drift("x", one(reference), one(current))


def normal(mean=0.0, sd=1.0, rows=20_000, seed=0):
    return np.random.default_rng(seed).normal(mean, sd, rows)


# --- effect sizes ----------------------------------------------------------------------------------------------------


def test_psi_ks_and_js_from_sketches_equal_those_of_the_rows():
    before, now = normal(seed=1), normal(0.4, 1.3, seed=2)
    edges = np.quantile(before, np.arange(1, 10) / 10)
    p, q = (np.bincount(np.searchsorted(edges, v), minlength=10) / len(v) for v in (before, now))
    result = drifted(before, now)
    assert result.psi == pytest.approx(((p - q) * np.log(p / q)).sum(), abs=0.005)
    points = np.sort(np.concatenate([before, now]))
    cdfs = [np.searchsorted(np.sort(v), points, "right") / len(v) for v in (before, now)]
    assert result.ks == pytest.approx(np.abs(cdfs[0] - cdfs[1]).max(), abs=0.002)
    middle = (p + q) / 2
    assert result.js == pytest.approx(np.sqrt((p * np.log2(p / middle) + q * np.log2(q / middle)).sum() / 2), abs=0.003)
    assert result.shift == pytest.approx((now.mean() - before.mean()) / before.std(ddof=1), abs=1e-9)


def test_no_drift_is_none_and_its_psi_is_noise():
    sizes = [drifted(normal(seed=s, rows=3000), normal(seed=s + 500, rows=3000)) for s in range(60)]
    assert {c.level for c in sizes} == {"none"}
    assert np.mean([c.psi for c in sizes]) == pytest.approx(sizes[0].noise, rel=0.2)


@pytest.mark.parametrize(
    ("now", "least"),
    [
        (normal(0.5, seed=1), "moderate"),  # half a standard deviation
        (normal(seed=1) * 1.6 + 3, "large"),
        (np.full(2000, 0.3), "large"),  # a stuck value
        (np.where(np.arange(20_000) % 20 == 0, np.nan, normal(seed=1)), "large"),  # 5% turned missing
        (np.where(np.arange(20_000) % 20 == 0, np.inf, normal(seed=1)), "large"),  # 5% turned infinite
        (np.full(2000, np.nan), "large"),  # all missing
    ],
    ids=["shift", "units", "stuck", "missing", "infinite", "nothing"],
)
def test_faults_of_numbers(now, least):
    words = list(statistics.LEVELS)
    assert words.index(drifted(normal(), now).level) <= words.index(least)


def test_a_constant_that_changes_is_seen():
    assert drifted(np.full(5000, 5.0), np.full(5000, 3.0)).level == "large"
    assert drifted(np.full(5000, 5.0), np.full(5000, 5.0)).psi == 0
    assert drifted(np.zeros(5000), np.where(np.arange(5000) % 5 == 0, -1.0, 0.0)).level == "large"


def test_texts():
    before = ["a"] * 5000 + ["b"] * 3000 + ["c"] * 2000
    assert drifted(before, before).psi == 0 and drifted(before, before).unseen == 0
    lost = drifted(before, ["a"] * 5000 + ["b"] * 3000)
    assert lost.level == "large" and lost.total_variation == pytest.approx(0.2) and lost.unseen == 0
    renamed = drifted(before, ["a"] * 5000 + ["b"] * 3000 + ["C"] * 2000)
    assert renamed.level == "large" and renamed.unseen == pytest.approx(0.2)
    assert renamed.hellinger == pytest.approx(np.sqrt(0.2)) and renamed.ks is None


def test_rare_values_share_a_bin():
    rng = np.random.default_rng(0)
    many = [f"v{i}" for i in range(200)]
    result = drifted(rng.choice(many, 20_000), rng.choice(many, 20_000))
    assert result.level == "none" and result.noise == pytest.approx(20 * 2 / 20_000)


def test_too_many_different_texts_are_not_compared():
    result = drifted([f"a{i}" for i in range(5000)], [f"b{i}" for i in range(5000)])
    assert result.level == statistics.NOT_COMPARED and result.psi is None and "about" in result.note


def test_a_small_window_is_said_to_be_small():
    result = drifted(normal(), normal(seed=1, rows=60))
    assert result.level == statistics.TOO_SMALL and result.rows == (20_000, 60) and result.noise > 0.05


def test_a_column_that_became_text_is_large():
    result = drifted(normal(), ["a"] * 5000)
    assert (result.level, result.kind, result.psi) == (
        "large",
        "mixed",
        None,
    ) and result.note == "numbers in the reference, texts now"


def test_booleans_may_be_numbers():
    flags = np.arange(3000) % 3 == 0
    assert drifted(flags.astype(float), flags).level == "none" and drifted(flags, flags).kind == "category"


def test_columns_without_values():
    nothing, something = [None] * 900, normal(rows=900)
    sizes = [drifted(*pair) for pair in ((nothing, nothing), (nothing, something), (something, nothing))]
    assert [c.level for c in sizes] == ["none", "large", "large"] and all(np.isfinite(c.psi) for c in sizes)


def test_objects_are_not_compared():
    assert drifted([[1]] * 10, [[2]] * 10).level == statistics.NOT_COMPARED


# --- tables ----------------------------------------------------------------------------------------------------------


def table(seed=0, rows=4000, **more) -> Profile:
    return Profile.of({"x": normal(seed=seed, rows=rows), "t": np.array(["a", "b"] * (rows // 2)), **more})


def test_columns_are_sorted_and_the_one_sided_are_named():
    now = Profile.of({"x": normal(3, rows=4000), "t": np.array(["a", "b"] * 2000), "fresh": np.arange(4000)})
    window = d.compare(table(gone=np.arange(4000)), {"now": now}).windows[0]
    assert [c.name for c in window.columns] == ["x", "t"] and (window.lost, window.new) == (["gone"], ["fresh"])


def test_what_drifts_by_construction_is_left_out_unless_named():
    times = np.datetime64("2013-07-01", "s") + np.arange(4000)
    extra = {
        "month": np.full(4000, 7),
        "request_id": np.array([f"r{i}" for i in range(4000)]),
        "departs": times,
        "hour": np.zeros(4000),
    }
    reference, now = table(**extra), table(1, **extra)
    assert d.compare(reference, {"now": now}).left_out == ["month", "request_id", "departs"]
    assert d.compare(reference, {"now": now}, window_size="hour").left_out == ["month", "request_id", "departs", "hour"]
    chosen = d.compare(reference, {"now": now}, columns=["month"])
    assert [c.name for c in chosen.windows[0].columns] == ["month"] and chosen.left_out == []


@pytest.mark.parametrize(
    ("windows", "columns", "message"),
    [
        ({"now": Profile.of({"other": np.arange(3)})}, None, "no column is in both"),
        ({"now": Profile.of({"x": np.empty(0)})}, None, "no rows"),
        ({}, None, "no rows"),
        ({"now": table()}, ["xx"], "no column 'xx'"),
    ],
)
def test_nothing_to_compare(windows, columns, message):
    with pytest.raises(ProfileError, match=message):
        d.compare(table(), windows, columns)


def test_an_empty_reference_is_refused():
    with pytest.raises(ProfileError, match="has no rows"):
        d.compare(Profile.of({"x": np.empty(0)}), {"now": table()})


def test_only_calendar_columns_in_common():
    with pytest.raises(ProfileError, match="by construction"):
        d.compare(Profile.of({"month": np.arange(5)}), {"now": Profile.of({"month": np.arange(5)})})


def test_the_dictionary_is_plain_json():
    import json

    document = json.loads(json.dumps(d.compare(table(), {"now": table(1)}, source="before").to_dict(), allow_nan=False))
    assert document["reference"] == {"source": "before", "rows": 4000, "columns": 2}
    assert {"name", "kind", "psi", "ks", "js", "level", "noise"} <= set(document["windows"][0]["columns"][0])


def test_the_headline_takes_the_newest_window_that_says_enough():
    windows = {
        "june": table(1),
        "july": Profile.of({"x": normal(3, rows=4000), "t": np.array(["a", "b"] * 2000)}),
        "now": table(2, 10),
    }
    result = d.compare(table(), windows, source="may")
    assert d.headline(result) == "july: 1 of 2 columns moved from may, 1 of them far; x the most."
    assert "too few" in d.headline(d.compare(table(), {"now": table(2, 10)}))
    assert "none of 2 columns" in d.headline(d.compare(table(), {"june": table(1)}))


# --- windows of tables -----------------------------------------------------------------------------------------------


def frame() -> pd.DataFrame:
    times = pd.date_range("2013-06-29", "2013-07-02", freq="30min", inclusive="left")
    return pd.DataFrame({"decision_time": times, "x": np.arange(len(times), dtype=float)})


@pytest.mark.parametrize(("by", "windows"), [("month", 2), ("day", 3), ("hour", 72)])
def test_split(by, windows):
    parts = sources.split_windows(frame(), by)
    assert len(parts) == windows and list(parts) == sorted(parts) and sum(p.rows for p in parts.values()) == 144


def test_split_takes_offsets_and_skips_rows_without_time():
    rows = pd.DataFrame(
        {"when": ["2013-06-30T23:30:00-04:00", None, "2013-06-30T10:00:00-04:00"], "x": [1.0, 2.0, 3.0]}
    )
    assert {k: p.rows for k, p in sources.split_windows(rows, "month", "when").items()} == {"2013-06": 1, "2013-07": 1}


@pytest.mark.parametrize(
    ("rows", "time", "message"),
    [
        (frame(), "decision_tim", "did you mean 'decision_time'"),
        (pd.DataFrame({"x": [1]}), None, "--time NAME"),
        (pd.DataFrame({"time": ["yesterday"]}), None, "cannot be read as times"),
    ],
)
def test_no_time(rows, time, message):
    with pytest.raises(ProfileError, match=message):
        sources.split_windows(rows, "day", time)


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_is_known_by_its_content(settings):
    root, rows = settings.root, frame()
    rows.to_parquet(root / "rows.data")
    rows.to_csv(root / "rows.csv", index=False)
    profile = Profile.of(rows)
    profile.write(root / "any.name")
    profile.write(root / "products/bundle/reference.profile")
    for source in (
        "rows.data",
        "rows.csv",
        "any.name",
        "bundle",
        "products/bundle",
        str(root / "products/bundle/reference.profile"),
    ):
        assert sources.read_reference(source, settings).columns["x"].mean == profile.columns["x"].mean
    assert len(sources.read_windows("rows.csv", settings, "day")) == 3


def test_a_csv_holds_what_the_reference_holds(settings):
    rng = np.random.default_rng(0)
    rows = {
        "code": rng.choice(["05", "10"], 2000),
        "country": rng.choice(["NA", "DE"], 2000),
        "far": rng.normal(size=2000),
        "late": rng.random(2000) < 0.5,
    }
    table = pd.DataFrame(rows)
    table.loc[:9, ["country", "far"]] = None
    reference = Profile.of(table)
    table.to_csv(settings.root / "rows.csv", index=False)
    table.to_csv(settings.root / "from_r.csv", index=False, na_rep="NA", columns=["far"])
    for source, columns in {"rows.csv": list(rows), "from_r.csv": ["far"]}.items():
        drift = d.compare(reference, sources.DriftSource(source, settings, reference=lambda: reference).windows())
        assert {c.name: c.psi for c in drift.windows[0].columns} == dict.fromkeys(columns, 0.0)


@pytest.mark.parametrize("unit", [1, 1000])
def test_numbers_are_times_where_they_are_seconds(unit):
    seconds = pd.date_range("2013-07-01", periods=48, freq="h").astype("datetime64[s]").astype(int) * unit
    table = pd.DataFrame({"time": seconds, "x": np.arange(48.0)})
    if unit == 1:
        assert list(sources.split_windows(table, "day")) == ["2013-07-01", "2013-07-02"]
        table["time"] = table["time"].astype(float).where(table["x"] > 0)
        assert [p.rows for p in sources.split_windows(table, "day").values()] == [23, 24]
    else:
        with pytest.raises(ProfileError, match="the numbers in column 'time' are not seconds since 1970"):
            sources.split_windows(table, "day")


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (None, "bundl", "did you mean 'bundle'"),
        (None, "bundle", "no bundle with a reference profile"),
        (b"PAR1 not really", "x.parquet", "not a readable Parquet"),
        (b"WHY1 not really", "x.profile", "x.profile"),
        (b"\x00\x01\x02\x03", "x.bin", "neither a whylogs profile nor a Parquet"),
        (b"", "x.csv", "x.csv is empty"),
        (b"a,b\n", "x.csv", "has no rows"),
        (None, ".", "not a model bundle"),
        (None, "log:july", "is not a period"),
        (None, "log", "no rows"),
    ],
)
def test_sources_that_are_none(settings, content, source, message):
    if content is not None:
        (settings.root / source).write_bytes(content)
    with pytest.raises(ProfileError, match=message):
        sources.read_windows(source, settings)


def test_a_profile_cannot_be_split(settings):
    table().write(settings.root / "x.profile")
    with pytest.raises(ProfileError, match="cannot be split by day"):
        sources.read_windows("x.profile", settings, "day")


# --- the log ---------------------------------------------------------------------------------------------------------


def prediction(at: str, number: int) -> Prediction:
    inputs = {"carrier": "UA" if number % 3 else "DL", "distance": 100.0 + number}
    return Prediction(
        request_id=f"r{number}",
        entity=f"UA|{number}",
        time=f"{at}Z",
        logged_at=f"{at}Z",
        model_version="v1",
        arm="champion",
        context_moment=f"{at}Z",
        latency_ms=0.4,
        output={"probability": 0.25, "decision": bool(number % 2)},
        input=inputs,
        features={"carrier": inputs["carrier"], "wind": None if number % 5 == 0 else float(number)},
    )


def log_hours(settings, hours, rows=20, start=0):
    "Log `rows` predictions in each of the hours, through a log of its own"
    log = PredictionLog(settings.path(settings.predictions))
    for hour in hours:
        log.append([prediction(f"{hour}:{i % 60:02}:00", start + i) for i in range(rows)])
    log.close()


def test_windows_of_the_log(settings):
    log_hours(settings, ["2013-07-04T05", "2013-07-04T06", "2013-07-05T00", "2013-08-01T00"])
    rows = lambda source, by=None: {label: p.rows for label, p in sources.read_windows(source, settings, by).items()}
    assert rows("log") == {"log": 80} and rows("log", "month") == {"2013-07": 60, "2013-08": 20}
    assert rows("log:2013-07", "day") == {"2013-07-04": 40, "2013-07-05": 20}
    assert rows("log:2013-07-04T05") == {"log:2013-07-04T05": 20}
    with pytest.raises(ProfileError, match="no rows in 2014; it has 2013-07-04T05 to 2013-08-01T00"):
        rows("log:2014")


def test_a_named_period_has_a_length():
    result = [
        sources.window_size_of_source(source)
        for source in ("log", "log:2013", "log:2013-07", "log:2013-07-04", "log:2013-07-04T05", "x.parquet")
    ]
    assert result == [None, None, "month", "day", "hour", None]


def test_compacting_changes_no_profile(settings):
    hours = ["2013-07-04T05", "2013-07-04T06", "2013-08-01T00"]
    log_hours(settings, hours)
    compactor, before = Compactor.of(settings), sources.read_windows("log", settings, "hour")
    compactor.run()
    after = sources.read_windows("log", settings, "hour")
    assert [p.to_bytes() for p in after.values()] == [p.to_bytes() for p in before.values()] and list(after) == hours
    log_hours(settings, hours[1:2], rows=5, start=100)
    assert [p.rows for p in sources.read_windows("log", settings, "hour").values()] == [20, 25, 20]
    compactor.run()
    assert [p.rows for p in sources.read_windows("log", settings, "hour").values()] == [20, 25, 20]


def test_profiles_beside_the_compactor_count_nothing_twice(settings):
    ended, compactor = threading.Event(), Compactor.of(settings)

    def compact():
        while not ended.is_set():
            compactor.run()

    thread = threading.Thread(target=compact)
    thread.start()
    try:
        for i in range(1, 8):
            log_hours(settings, ["2013-07-04T05"], start=20 * i)
            assert sources.read_windows("log", settings)["log"].rows == 20 * i
    finally:
        ended.set()
        thread.join()
