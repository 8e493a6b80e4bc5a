"""One value, one rule: JSON rows, JSON columns, Arrow, CSV and Parquet read a value alike, or all refuse it."""

import csv
import json
from datetime import UTC, date, datetime, time
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlnb.data.fields import Field
from mlnb.monitoring.labels import import_labels
from mlnb.project.errors import ServingError
from mlnb.serving.column_validation import ArrowColumns, JsonColumns, to_arrow_stream
from mlnb.serving.labels import LabelDecoder, LabelStore
from mlnb.serving.row_validation import RequestSchema
from mlnb.serving.table_files import check_columns, open_reader, validate_batch

parse_labels = LabelDecoder().labels
EXAMPLES = {"string": "UA", "integer": 1, "number": 1.5, "time": "2013-07-01T05:15:00Z"}
REFUSED = "refused"

NUMBERS = [  # as they are written in JSON and in a cell
    "0", "-0", "1", "-1", "1.0", "1.5", "-1.50", "1e3", "1E3", "1e+3", "1e-3", "-0.0", "0.1", "1e22",
    "1e400", "-1e400", "1e-400",
    "5e-324", "9007199254740992", "9007199254740993", "-9007199254740993", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "123456789012345678901234567890", "0.30000000000000004",
    "179769313486231570000000000000000000000e270",
    "3.0000000000000001", "1.", ".5", "+1", "1,000", "1_000", "0x10", "True", "true", "false", "NaN", "nan",
    "Infinity", "-inf",
    "null", "NA", "N/A", "none", "--1", "1e", "e3", "1d", "١", "½", "1e3.5", "١٢",
]  # fmt: skip
TIMES = [
    "2013-07-01T05:15:00Z", "2013-07-01T05:15:00z", "2013-07-01t05:15:00Z", "2013-07-01 05:15:00Z",
    "2013-07-01T05:15:00+00:00",
    "2013-07-01T05:15:00-04:00", "2013-07-01T05:15:00+0000", "2013-07-01T05:15:00+00", "2013-07-01T05:15:00-00:00",
    "2013-07-01T05:15:00+23:59", "2013-07-01T05:15:00+24:00", "2013-07-01T05:15:00+05:60", "2013-07-01T05:15:00.5Z",
    "2013-07-01T05:15:00.999999Z", "2013-07-01T05:15:00.9999999Z", "2013-07-01T05:15:00.123456789Z",
    "2013-07-01T05:15:00,5Z",
    "2013-07-01T05:15:00.Z", "2013-07-01T05:15Z", "2013-07-01T05Z", "2013-07-01", "2013-07-01T05:15:00",
    "2013-07-01 05:15:00",
    "2013-07-01T24:00:00Z", "2013-07-01T05:15:60Z", "2016-12-31T23:59:60Z", "2013-02-29T05:15:00Z",
    "2012-02-29T05:15:00Z",
    "1899-12-31T23:59:59Z", "1900-01-01T00:00:00Z", "2199-12-31T23:59:59Z", "2200-01-01T00:00:00Z",
    "1969-12-31T23:59:59.5Z",
    "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "20130701T051500Z", "2013-7-1T05:15:00Z",
    " 2013-07-01T05:15:00Z", "now",
    "1372655700", "2013-07-01T05:15:00 Z", "2013-07-01T05:15:00UTC", "2013-07-01T05:15:00Z ",
    "2199-12-31T23:59:59-04:00",
    "1900-01-01T00:00:00+04:00",
]  # fmt: skip
TEXTS = [
    "UA", "007", "1", "1.0", "1e3", "true", "True", "NA", "N/A", "null", "NULL", "NaN", "nan", "None", "-",
    " ", " UA ", "a,b", 'a"b',
    "é" * 100, "é" * 101, "x" * 100, "x" * 101, "東京", "a\tb", "a\nb", "a\x7f", "a\x01b", "a\x0cb", "a\u0085b",
    "\u202e", "a\u2028b", "2013-07-01", "", "=1",
]  # fmt: skip


def values_of(columns, name="x"):
    "A value as it goes to the model, or that it was refused"
    return columns[name].tolist()


def one(decode):
    try:
        return decode()
    except ServingError:
        return REFUSED


def of_json(field: Field, literal: str):
    schema = RequestSchema((field,))
    return one(lambda: values_of(schema.columns(schema.decode(b'{"x": %s}' % literal.encode())[0]))[0])


def of_json_columns(field: Field, literal: str):
    return one(lambda: values_of(JsonColumns((field,)).decode(b'{"x": [%s]}' % literal.encode()).columns)[0])


def of_file(field: Field, path) -> list:
    "What each row of a file is, in order"
    source = open_reader(path)
    try:
        check_columns(path, source.schema, (field,), source.text)
    except ServingError:
        return [REFUSED] * pq.read_metadata(path).num_rows
    results = []
    for batch in source:
        columns, good, _ = validate_batch(batch, (field,))
        values = iter(values_of(columns))
        results += [next(values) if fine else REFUSED for fine in good]
    return results


def of_cells(field: Field, texts: list[str], folder) -> list:
    with (folder / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["x"], *([text] for text in texts)])
    return of_file(field, folder / "in.csv")


def of_parquet(field: Field, array: pa.Array, folder) -> list:
    pq.write_table(pa.table({"x": array}), folder / "in.parquet")
    return of_file(field, folder / "in.parquet")


def of_arrow(field: Field, array: pa.Array) -> list:
    "Each row alone, since one that is wrong refuses the table"
    decode = ArrowColumns((field,)).decode
    rows = (array[i : i + 1] for i in range(len(array)))
    return [one(lambda row=row: values_of(decode(to_arrow_stream(pa.table({"x": row}))).columns)[0]) for row in rows]


def same(values: list) -> list[str]:
    return [repr(value + 0.0 if isinstance(value, float) else value) for value in values]  # -0.0 is 0.0


@pytest.mark.parametrize(
    ("kind", "texts", "literal"),
    [
        ("number", NUMBERS, str), ("integer", NUMBERS, str), ("time", TIMES, json.dumps),
        ("string", TEXTS, lambda text: json.dumps(text, ensure_ascii=False)),
    ],
)  # fmt: skip
def test_a_cell_is_read_as_json_with_the_same_characters(kind, texts, literal, tmp_path):
    field = Field("x", kind, "", EXAMPLES[kind])
    rows, columns = ([read(field, literal(text)) for text in texts] for read in (of_json, of_json_columns))
    cells = of_cells(field, texts, tmp_path)
    assert dict(zip(texts, same(columns), strict=True)) == dict(zip(texts, same(rows), strict=True))
    assert dict(zip(texts, same(cells), strict=True)) == dict(zip(texts, same(rows), strict=True))
    assert 3 < rows.count(REFUSED) < len(rows) - 3


def test_padded_numbers_are_numbers_in_a_cell(tmp_path):
    "JSON has no such form; a field of text keeps it"
    assert of_cells(Field("x", "integer", "", 1), ["007", "-05"], tmp_path) == [7, -5]
    assert of_cells(Field("x", "number", "", 1.5), ["007", "00.5"], tmp_path) == [7, 0.5]
    assert of_cells(Field("x", "string", "", "UA"), ["007", "-05"], tmp_path) == ["007", "-05"]


MOMENTS = [datetime(2013, 7, 1, 5, 15, tzinfo=UTC), datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC), None]
TYPED = {
    "bool": pa.array([True, False, None]),
    "null": pa.nulls(3),
    "int8": pa.array([1, -128, None], pa.int8()),
    "uint8": pa.array([1, 255, None], pa.uint8()),
    "int64": pa.array([1, 2**53, 2**53 + 1, -(2**53) - 1, None]),
    "uint64": pa.array([1, 2**53, 2**53 + 1, 2**63, 2**64 - 1, None], pa.uint64()),
    "float16": pa.array(np.array([1.5, np.nan, np.inf], np.float16)),
    "float32": pa.array([1.5, 0.1, float("nan"), float("inf"), None], pa.float32()),
    "float64": pa.array([1.5, 1.0, float("nan"), -float("inf"), None]),
    "decimal": pa.array([Decimal("1.50"), Decimal("0.10"), None], pa.decimal128(20, 2)),
    "decimal of whole numbers": pa.array([Decimal("1"), Decimal("9007199254740993"), None], pa.decimal128(20, 0)),
    "wide decimal": pa.array([Decimal("1.5"), Decimal("1e60"), None], pa.decimal256(70, 5)),
    "string": pa.array(["UA", "", "007", "1", "a\tb", "x" * 101, None]),
    "large string": pa.array(["UA", "", None], pa.large_string()),
    "string view": pa.array(["UA", "", "x" * 50, None], pa.string_view()),
    "dictionary": pa.array(["UA", "B6", None, "UA"]).dictionary_encode(),
    "dictionary with a null in it": pa.DictionaryArray.from_arrays(
        pa.array([0, 1, 0], pa.int8()), pa.array(["UA", None])
    ),
    "dictionary of numbers": pa.array([1, 2, None]).dictionary_encode(),
    "dictionary of large strings": pa.array(["UA", None], pa.large_string()).dictionary_encode(),
    "binary": pa.array([b"UA", None]),
    "date": pa.array([date(2013, 7, 1), None]),
    "date64": pa.array([date(2013, 7, 1), None], pa.date64()),
    "time": pa.array([time(5, 15), None]),
    "duration": pa.array([1, None], pa.duration("s")),
    "list": pa.array([["UA"], None]),
    **{f"timestamp {unit}": pa.array(MOMENTS, pa.timestamp(unit, "UTC")) for unit in ("s", "ms", "us", "ns")},
    "timestamp of a zone": pa.array(MOMENTS, pa.timestamp("us", "America/New_York")),
    "timestamp of an offset": pa.array(MOMENTS, pa.timestamp("ms", "-04:00")),
    "timestamp without a zone": pa.array([datetime(2013, 7, 1), None], pa.timestamp("us")),
    "timestamps out of range": pa.array([-(10**11), 10**11], pa.timestamp("s", "UTC")),
    "fractions before 1970": pa.array([-1, -999_999, -1_000_001], pa.timestamp("us", "UTC")),
}


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("name", TYPED)
def test_a_column_of_arrow_and_of_parquet_is_read_alike(kind, name, tmp_path):
    field = Field("x", kind, "", EXAMPLES[kind])
    try:
        of_disk = of_parquet(field, TYPED[name], tmp_path)
    except pa.ArrowNotImplementedError:
        pytest.skip("Parquet has no such type")
    assert same(of_arrow(field, TYPED[name])) == same(of_disk)


LABELS = {  # JSON -> what it is, None: refused
    "true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0, "1e0": 1, "-0": 0, "2": None, "0.5": None,
    "-1": None, "null": None,
    '"1"': None, '"true"': None, '"yes"': None, '""': None, "[]": None, "1e400": None,
}  # fmt: skip
CELLS = {
    "True": 1,
    "False": 0,
    "TRUE": 1,
    "FALSE": 0,
    "yes": None,
    "t": None,
    "": None,
    "NA": None,
    "NaN": None,
    "true1": None,
}


def added(path, tmp_path) -> dict:
    "Entity -> label of the rows of a file that were kept"
    store = LabelStore(tmp_path / f"lines{path.suffix}", str(tmp_path / f"kept{path.suffix}"))
    none = pa.table({"entity": pa.array([], pa.string()), "time": pa.array([], pa.timestamp("us", "UTC"))})
    import_labels(path, store, none)
    table = store.read()
    return dict(zip(table["entity"].to_pylist(), table["value"].to_pylist(), strict=True))


def test_labels_are_read_alike(tmp_path):
    "A label that /outcomes takes is taken from a file too, with the same characters; so are words of pandas, R, Excel"
    for literal, label in LABELS.items():
        body = b'{"entity": "e", "value": %s}' % literal.encode()
        value = one(lambda body=body: parse_labels(body)[0].value)
        assert value == (REFUSED if label is None else label), literal
    cells = {text: label for text, label in LABELS.items() if not text.startswith('"')} | CELLS
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["entity", "value"], *([f"e{i}", text] for i, text in enumerate(cells))])
    expected = {f"e{i}": label for i, label in enumerate(cells.values()) if label is not None}
    assert added(tmp_path / "in.csv", tmp_path) == expected


@pytest.mark.parametrize(
    "values",
    [
        pa.array([True, False, None]), pa.array([1, 0, None], pa.int8()), pa.array([1, 0, 2, None], pa.uint64()),
        pa.array([1.0, 0.0, 0.5, float("nan"), None]), pa.array(np.array([1, 0, 2], np.float16)),
        pa.array([Decimal(1), Decimal(0), None], pa.decimal128(5, 2)),
    ],
    ids=lambda array: str(array.type),
)  # fmt: skip
def test_labels_of_a_column_are_read_alike(values, tmp_path):
    pq.write_table(
        pa.table({"entity": [f"e{i}" for i in range(len(values))], "value": values}), tmp_path / "in.parquet"
    )
    assert added(tmp_path / "in.parquet", tmp_path) == {"e0": 1, "e1": 0}


@pytest.mark.parametrize("text", TIMES)
def test_moments_of_outcomes_are_read_alike(text, tmp_path):
    sent = one(
        lambda: parse_labels(json.dumps({"entity": "e", "value": 1, "observed_at": text}).encode())[0].observed_at
    )
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["entity", "value", "observed_at"], ["e", "1", text]])
    store = LabelStore(tmp_path / "lines", str(tmp_path / "kept"))
    import_labels(
        tmp_path / "in.csv",
        store,
        pa.table({"entity": pa.array([], pa.string()), "time": pa.array([], pa.timestamp("us", "UTC"))}),
    )
    times = store.read()["observed_at"].to_pylist()
    assert [moment.replace(microsecond=0) for moment in times] == (
        [] if sent == REFUSED else [sent.replace(microsecond=0)]
    )
