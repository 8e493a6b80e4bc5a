"""Texts, vectors and images are profiled as a few numbers, whatever library holds them, and drift sees those."""

import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from mlnb.data.profiles import Profile
from mlnb.data.value_summaries import summarise
from mlnb.monitoring.drift import compare


def image(grey: int, size=(20, 10), kind="PNG") -> bytes:
    Image.new("RGB", size, (grey,) * 3).save(file := io.BytesIO(), kind)
    return file.getvalue()


TEXTS = ["The flight was late again. " * 8, None, "Gut, 3 von 5"]
VECTORS = [[3.0, 4.0], None, [0.0, 1.0]]
TENSORS = [[[1.0, 2.0], [2.0, 4.0]], None, [[0.0, 0.0], [0.0, 3.0]]]
IMAGES = [image(51), None, image(102, (6, 8), "JPEG")]
COLUMNS = {
    "text": (TEXTS, pa.large_string(), {"length", "words", "letters", "digits", "spaces", "others"}),
    "vector": (VECTORS, pa.list_(pa.float64(), 2), {"norm", "mean", "std", "min", "max"}),
    "tensor": (TENSORS, pa.list_(pa.list_(pa.float32())), {"norm", "mean", "std", "min", "max"}),
    "image": (IMAGES, pa.binary(), {"width", "height", "brightness", "contrast", "bytes"}),
    "blob": ([b"abc", None, b""], pa.large_binary(), {"bytes"}),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_library_gives_the_same_profile(name, tmp_path):
    values, kind, names = COLUMNS[name]
    table = pa.table({"x": pa.array(values, kind)})
    array = np.empty(3, object)
    array[:] = values
    profiles = [Profile.of(data) for data in (table, table.to_pandas(), {"x": values}, {"x": array})]
    for profile in profiles:
        assert set(profile.columns) == {"x", *(f"x.{suffix}" for suffix in names)}
        assert profile.columns["x"].missing == 1 and profile.rows == 3
        numbers = {n: c for n, c in profile.columns.items() if n != "x"}
        assert {(c.count, c.missing, c.kind) for c in numbers.values()} == {(3, 1, "number")}
        assert {n: c.mean for n, c in numbers.items()} == {n: profiles[0].columns[n].mean for n in numbers}
    stored = profiles[0].to_bytes()
    assert b"late again" not in stored and b"PNG" not in stored
    assert set(Profile.from_bytes(stored).columns) == set(profiles[0].columns)


def test_an_array_of_tensors_is_profiled_as_its_rows():
    images = np.random.default_rng(0).random((50, 8, 8)).astype(np.float32)
    together, apart = Profile.of({"x": images}), Profile.of({"x": images.tolist()})
    assert together.columns["x.norm"].mean == pytest.approx(apart.columns["x.norm"].mean)
    assert together.columns["x"].count == 50 and together.columns["x"].kind == "object"


def test_short_texts_and_numbers_are_left_as_they_are():
    table = {"a": ["UA", None, "B6"], "b": [1, 2, 3], "c": pd.Categorical(["x", "y", "x"]), "d": [True, None, False]}
    assert set(Profile.of(table).columns) == set(table)
    assert all(summarise(values)[1] == {} for values in table.values())


def test_a_damaged_image_has_its_size_only():
    damaged = image(51, (300, 300))
    _, summaries = summarise([image(51), damaged[:-40], b"\x89PNG\r\nno"])
    assert summaries["width"].tolist()[:2] == [20, 300] and np.isnan(summaries["brightness"][1:]).all()
    assert summaries["brightness"][0] == pytest.approx(0.2)


def test_a_column_of_the_table_keeps_its_name():
    profile = Profile.of({"x": VECTORS, "x.norm": [1.0, 1.0, 1.0]})
    assert profile.columns["x.norm"].mean == 1.0 and "x.mean" in profile.columns


def test_drift_sees_darker_images_and_shorter_texts():
    rng = np.random.default_rng(0)
    table = lambda grey, words: {
        "photo": [image(int(g)) for g in rng.integers(grey, grey + 20, 1500)],
        "review": ["good plane " * int(n) for n in rng.integers(words, 2 * words, 1500)],
    }
    reference, same, other = (Profile.of(table(*of)) for of in ((100, 40), (100, 40), (30, 10)))
    windows = {window.window: window for window in compare(reference, {"same": same, "other": other}).windows}
    levels = {label: {c.name: c.level for c in window.columns} for label, window in windows.items()}
    assert not any(window.lost or window.new for window in windows.values())
    for name in ("photo.brightness", "review.length", "review.words"):
        assert (levels["same"][name] != "large", levels["other"][name]) == (True, "large")
