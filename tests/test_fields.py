"""Every type of field, in every format: the same columns for the same values, one clear sentence for a wrong one."""

import csv
import io
import json
from base64 import b64encode
from datetime import UTC, datetime

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from mlnb.data import field_values
from mlnb.data.field_schemas import json_schema
from mlnb.data.fields import Field, columns_of, field_type, records_of
from mlnb.models.manifest import check_fields
from mlnb.project.errors import BundleError, ServingError
from mlnb.serving.column_validation import ArrowColumns, JsonColumns, to_arrow_stream
from mlnb.serving.row_validation import RequestError, RequestSchema
from mlnb.serving.table_files import check_columns, open_reader, validate_batch


def image(size=(4, 3), kind="PNG", **options) -> bytes:
    Image.new("L", size, 7).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


PNG = b64encode(image()).decode()
AT = datetime(2013, 7, 1, 9, 15, tzinfo=UTC)
FIELDS = {  # the field "x" of each type, with two values in JSON
    "string": (Field("x", "string", "", "UA"), ["a\nb \"c\" \\", "é" * 3000]),
    "short string": (Field("x", "string", "", "UA", max_length=4), ["UA", "B6 é"]),
    "integer": (Field("x", "integer", "", 1), [1, -(2**53)]),
    "number": (Field("x", "number", "", 1.5), [1.5, -0.1]),
    "boolean": (Field("x", "boolean", "", True), [True, False]),
    "time": (Field("x", "time", "", "2013-07-01T09:15:00Z"), ["2013-07-01T09:15:00Z", "1969-12-31T23:59:59Z"]),
    "category": (Field("x", "category", "", "red", categories=("red", "light blue")), ["light blue", "red"]),
    "vector": (Field("x", "vector", "", [0.5, 1.0], shape=2), [[0.5, -1.0], [1e300, 0.25]]),
    "float32": (Field("x", "vector", "", [0.5], dtype="float32", shape=1), [[0.5], [-3.0]]),
    "tensor": (Field("x", "tensor", "", [[1.0, 2, 3]] * 2, shape=(2, 3)), [[[1, 2, 3.5], [4, 5, 6]], [[0] * 3] * 2]),
    "pixels": (Field("x", "tensor", "", [[0], [1]], dtype="uint8", shape=(2, 1)), [[[0], [255]], [[1], [2]]]),
    "flags": (Field("x", "vector", "", [True], dtype="bool", shape=1), [[True], [False]]),
    "bytes": (Field("x", "bytes", "", "aGk=", max_length=10), ["aGk=", b64encode(bytes(range(10))).decode()]),
    "image": (Field("x", "image", "", PNG), [PNG, b64encode(image((9, 2), "JPEG")).decode()]),
}  # fmt: skip
NULLABLE = [name for name in FIELDS if name not in ("pixels", "flags")]  # whole numbers and booleans have no NaN


def arrow_array(field: Field, values: list) -> pa.Array:
    "JSON values as the natural Arrow column"
    if field.type == "time":
        return pa.array([v and datetime.fromisoformat(v) for v in values], pa.timestamp("us", "UTC"))
    if field.type in ("image", "bytes"):
        return pa.array([v and msgspec.convert(v, bytes) for v in values], pa.binary())
    array = pa.array(values)
    return array.dictionary_encode() if field.type == "category" and any(values) else array


def cell(value) -> str:
    "A JSON value as a cell of CSV"
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value)


def from_rows(fields, values, tmp_path):
    schema = RequestSchema(fields)
    rows, _ = schema.decode(json.dumps([{"x": v} for v in values]).encode())
    return schema.columns(rows)


def from_columns(fields, values, tmp_path):
    return JsonColumns(fields).decode(json.dumps({"x": values}).encode()).columns


def from_arrow(fields, values, tmp_path):
    return ArrowColumns(fields).decode(to_arrow_stream(pa.table({"x": arrow_array(fields[0], values)}))).columns


def from_file(fields, path):
    source = open_reader(path)
    check_columns(path, source.schema, fields, source.text)
    results = [validate_batch(batch, fields) for batch in source]
    problems = [problem for _, _, table in results for problem in table.to_pylist()]
    if problems:
        raise RequestError("rows are wrong", problems)
    ((columns, _, _),) = results
    return columns


def from_csv(fields, values, tmp_path):
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["x", "other"], *([cell(v), "1"] for v in values)])
    return from_file(fields, tmp_path / "in.csv")


def from_parquet(fields, values, tmp_path):
    pq.write_table(pa.table({"x": arrow_array(fields[0], values)}), tmp_path / "in.parquet")
    return from_file(fields, tmp_path / "in.parquet")


FORMATS = [from_rows, from_columns, from_arrow, from_csv, from_parquet]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    equal = {"equal_nan": True} if a.dtype.kind in "fM" else {}
    return a.dtype.kind == b.dtype.kind and a.shape == b.shape and np.array_equal(a, b, **equal)


@pytest.mark.parametrize("read", FORMATS)
@pytest.mark.parametrize("name", FIELDS)
def test_a_value_gives_the_same_column_in_every_format(read, name, tmp_path):
    field, values = FIELDS[name]
    expected = columns_of([field], [{"x": v} for v in values])["x"]
    assert same(read((field,), values, tmp_path)["x"], expected)
    assert records_of([field], {"x": expected}) == [{"x": v} for v in values]


@pytest.mark.parametrize("read", FORMATS)
@pytest.mark.parametrize("name", NULLABLE)
def test_null_is_missing_where_a_field_is_nullable(read, name, tmp_path):
    field, values = FIELDS[name]
    nullable = msgspec.structs.replace(field, nullable=True)
    for sent in ([values[0], None], [None, None]):
        column = read((nullable,), sent, tmp_path)["x"]
        assert same(column, field_type(nullable).column(sent))
        assert records_of([nullable], {"x": column}) == [{"x": v} for v in sent]
    with pytest.raises(RequestError) as e:
        read((field,), [values[0], None], tmp_path)
    assert [(p["row"], p["field"]) for p in e.value.fields] == [(1, "x")]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_with_a_default_may_be_left_out(name, tmp_path):
    field, values = FIELDS[name]
    fields = (msgspec.structs.replace(field, default=values[1]), Field("y", "integer", "", 1))
    expected = field_type(field).column([values[0], values[1]])
    schema, rows = RequestSchema(fields), [{"x": values[0], "y": 1}, {"y": 2}]
    decoded, _ = schema.decode(json.dumps(rows).encode())
    assert same(schema.columns(decoded)["x"], expected)
    assert json.loads(msgspec.json.encode(decoded[1])) == {"x": json.loads(json.dumps(values[1])), "y": 2}  # the log
    (tmp_path / "in.csv").write_text("y\n1\n")
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["x", "y"], [cell(values[0]), 1], ["", 2]])
    assert same(from_file(fields, tmp_path / "cells.csv")["x"], expected)
    tables = [ArrowColumns(fields).decode(to_arrow_stream(pa.table({"y": [1]}))).columns]
    tables += [JsonColumns(fields).decode(b'{"y": [1]}').columns, from_file(fields, tmp_path / "in.csv")]
    assert all(same(columns["x"], field_type(field).column([values[1]])) for columns in tables)
    with pytest.raises(RequestError):
        schema.decode(b'{"x": null, "y": 1}')


BOMB = b64encode(image((9000, 9000))).decode()
WRONG = [  # name of the field, value, words of the problem
    ("string", "a\0", "printable"), ("string", "", "at least 1"), ("short string", "x" * 3_000_000, "3,000,000 chara"),
    ("boolean", "yes", "true or false"), ("category", "rde", "did you mean 'red'?"), ("category", "", "categories"),
    ("vector", [1.0], "the shape 1, not 2"), ("vector", [[1.0, 2.0]], "the shape 1 x 2, not 2"),
    ("vector", [1.0, None], r"null at \[1\]"), ("float32", [1e39], r"1e\+39 at \[0\]"),
    ("tensor", [[1, 2, 3], [4, 5]], "lists of different lengths"), ("pixels", [[0], [256]], r"256 at \[1\]\[0\]"),
    ("bytes", b64encode(bytes(11)).decode(), "11 bytes, the limit is 10"),
    ("image", b64encode(b"GIF89a").decode(), "no PNG"), ("image", BOMB, "9000 x 9000 pixels"),
    ("image", b64encode(image((99, 99))[:-30]).decode(), "corrupt or truncated"),
    ("image", b64encode(image((99, 99), "JPEG")[:-99]).decode(), "corrupt or truncated"),
]  # fmt: skip


@pytest.mark.parametrize("read", FORMATS)
@pytest.mark.parametrize(("name", "value", "words"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_value_is_refused_in_one_sentence(read, name, value, words, tmp_path):
    field, values = FIELDS[name]
    is_typed = read in (from_arrow, from_parquet)
    try:
        with pytest.raises(ServingError) as e:
            read((field,), [values[0], value], tmp_path)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pytest.skip("a column of Arrow has one type")
    if not isinstance(e.value, RequestError):  # the file has a column of the wrong type
        assert is_typed and "'x'" in str(e.value)
        return
    (problem,) = e.value.fields
    assert problem["field"] == "x" and len(problem["problem"]) < 250 and problem["expected"]
    if problem["row"] is None:
        assert is_typed and "has the type" in problem["problem"]
    elif read is from_csv and value == "":
        assert problem["problem"] == "is missing"
    else:
        assert problem["row"] == 1
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(problem["problem"])


@pytest.mark.parametrize("value", ["aGk", "aGk==", "a-_=", "aGk=\n", "data:image/png;base64,aGk=", 7, ["aGk="]])
def test_base64_is_strict(value):
    field, _ = FIELDS["bytes"]
    for decoder, body in ((RequestSchema((field,)), {"x": value}), (JsonColumns((field,)), {"x": [value]})):
        with pytest.raises(RequestError) as e:
            decoder.decode(json.dumps(body).encode())
        assert [(p["row"], p["field"]) for p in e.value.fields] == [(0, "x")]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_vectors_that_are_not_finite_are_refused(dtype, tmp_path):
    field = Field("x", "vector", "", [0.0, 1.0], dtype=dtype, shape=2, nullable=True)
    for value in (float("nan"), float("inf"), -float("inf")):
        for read in FORMATS:
            with pytest.raises(RequestError) as e:
                read((field,), [[0.0, 1.0], [value, 1.0]], tmp_path)
            assert [(p["row"], p["field"]) for p in e.value.fields] == [(1, "x")]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32(), 2), pa.large_list(pa.int8()), pa.list_(pa.decimal128(5, 1)), pa.list_(pa.float64())]
)
def test_a_vector_in_every_list_of_arrow(kind):
    field = Field("x", "vector", "", [0.0, 1.0], dtype="float32", shape=2, nullable=True)
    array = pa.array([[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0]]).cast(pa.list_(pa.decimal128(5, 1))).cast(kind)
    column = ArrowColumns((field,)).decode(to_arrow_stream(pa.table({"x": array.slice(1)}))).columns["x"]
    assert same(column, np.array([[np.nan] * 2, [3, 4], [5, 6]], np.float32))


def test_a_dictionary_of_one_long_text_is_not_expanded():
    field = FIELDS["string"][0]
    array = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array(["x" * 10_000]))
    with pytest.raises(RequestError, match="send fewer rows"):
        ArrowColumns((field,)).decode(to_arrow_stream(pa.table({"x": array})))


def test_one_long_text_among_short_ones_takes_its_own_memory(tmp_path):
    texts = ["x" * 500_000, *["a"] * 2000]
    for read in FORMATS:
        column = read((FIELDS["string"][0],), texts, tmp_path)["x"]
        assert column.dtype == object and column.tolist() == texts


def test_a_repeated_key_is_found_beside_nulls_and_defaults():
    fields = (
        msgspec.structs.replace(FIELDS["string"][0], nullable=True, default=None),
        Field("y", "vector", "", [0.0], shape=1, default=[1.0]),
    )
    schema = RequestSchema(fields)
    for body in ('{"x": null, "y": [1]}', '{"x": "a\\"", "y": [1]}', "{}", '[{"y": [2]}, {"x": "\\\\"}]'):
        schema.decode(body.encode())
    for body in ('{"x": null, "x": "a"}', '{"y": [1], "y": [1]}', '[{"x": "\\""}, {"x": "b", "\\u0078": null}]'):
        with pytest.raises(RequestError) as e:
            schema.decode(body.encode())
        assert e.value.fields[0]["problem"] == "is there more than once"


def test_an_old_bundle_is_read_and_written_byte_for_byte():
    old = b'{"name":"carrier","type":"string","description":"Airline","example":"UA"}'
    assert msgspec.json.encode(msgspec.json.decode(old, type=Field)) == old


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "vector"}, "has shape ()"), ({"type": "category"}, "has no categories"),
        ({"type": "category", "categories": ("a", "a")}, "'a' twice"), ({"categories": ("a",)}, "only category"),
        ({"type": "vector", "shape": 2, "dtype": "object"}, "one of float64"), ({"max_length": 0}, "at least 1"),
        ({"default": "x" * 9, "max_length": 3}, "default"), ({"type": "boolean", "example": "yes"}, "example"),
        ({"type": "vector", "shape": 2, "dtype": "int8", "nullable": True}, "no missing value"),
        ({"type": "vector", "shape": (2, 2)}, "tensor"), ({"type": "image", "example": "aGk="}, "no PNG"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_refused_with_its_bundle(changes, words):
    field = msgspec.structs.replace(Field("x", "string", "", "UA"), **changes)
    with pytest.raises(BundleError, match="field 'x'") as e:
        check_fields((field,), ())
    assert words in str(e.value)


def test_an_entity_is_always_there_and_its_texts_are_short():
    field = Field("x", "string", "", "UA", nullable=True)
    with pytest.raises(BundleError, match="is nullable"):
        check_fields((field,), ("x",))
    (bounded,) = field_values.bound_entity((FIELDS["string"][0],), ("x",))
    assert field_values.value_problem(bounded, "x" * 101) and not field_values.value_problem(bounded, "x" * 100)


@pytest.mark.parametrize("name", FIELDS)
def test_openapi_accepts_what_the_service_does(name):
    field, values = FIELDS[name]
    schema = json_schema(field)
    Draft202012Validator.check_schema(schema)
    accepts = Draft202012Validator(schema).is_valid
    assert all(map(accepts, [*values, schema["example"]])) and not accepts(None)
    if name in NULLABLE:
        nullable = json_schema(msgspec.structs.replace(field, nullable=True, default=values[0]))
        assert all(map(Draft202012Validator(nullable).is_valid, [*values, None])) and nullable["default"] == values[0]
    for wrong, value, _ in WRONG:
        is_structural = wrong not in ("image", "float32", "bytes") and value != "a\0"  # what a schema cannot say
        assert wrong != name or not (is_structural and accepts(value)), value
