import json
from datetime import UTC, datetime

import numpy as np
import pytest

from mlnb.data.fields import Field
from mlnb.serving.row_validation import RequestError, RequestSchema

FIELDS = (
    Field("carrier", "string", "Airline", "UA", max_length=100),
    Field("flight", "integer", "Flight number", 1545),
    Field("distance", "number", "Miles", 1400.0),
    Field("departure", "time", "Scheduled departure", "2013-07-01T05:15:00-04:00"),
)
SCHEMA = RequestSchema(FIELDS)
RIGHT = {f.name: json.dumps(f.example) for f in FIELDS}


def body(**changed) -> bytes:
    "A right request with fields replaced by raw JSON, or removed by None"
    fields = {k: v for k, v in (RIGHT | changed).items() if v is not None}
    return ("{" + ", ".join(f'"{k}": {v}' for k, v in fields.items()) + "}").encode()


def problems(data: bytes) -> list[dict]:
    with pytest.raises(RequestError) as e:
        SCHEMA.decode(data)
    return e.value.fields


def test_a_right_request_becomes_columns():
    rows, many = SCHEMA.decode(body())
    columns = SCHEMA.columns(rows)
    assert not many and {k: v.dtype.kind for k, v in columns.items()} == {
        "carrier": "U",
        "flight": "f",
        "distance": "f",
        "departure": "M",
    }
    assert columns["departure"].dtype == "datetime64[s]" and str(columns["departure"][0]) == "2013-07-01T09:15:00"


def test_an_array_is_many_even_with_one_row():
    rows, many = SCHEMA.decode(b"[" + body() + b"]")
    assert many and len(rows) == 1


def test_decision_times():
    rows, _ = SCHEMA.decode(b"[" + body() + b"," + body(decision_time='"2013-07-01T03:15:30.9-04:00"') + b"]")
    now = datetime(2020, 1, 1, tzinfo=UTC)
    assert SCHEMA.decision_times(rows, now).tolist() == [datetime(2020, 1, 1), datetime(2013, 7, 1, 7, 15, 30)]


def test_a_whole_number_will_do_for_a_number():
    rows, _ = SCHEMA.decode(body(distance="1400"))
    assert rows[0].distance == 1400.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("distance", v)
            for v in (
                "NaN",
                "Infinity",
                "-Infinity",
                "1e999",
                "-1e999",
                "9" * 5000,
                '"1.5"',
                "true",
                "null",
                "[]",
                "{}",
            )
        ),
        *(("flight", v) for v in ("1.0", "1.5", "1e3", "NaN", "9007199254740993", "9" * 5000, '"7"', "false", "null")),
        *(
            ("carrier", v)
            for v in ("7", '""', '"a\\u0000"', '"a\\u0001b"', f'"{"x" * 101}"', "null", "[]")
        ),
        *(
            ("departure", v)
            for v in ('"2013-07-01T05:15:00"', '"2013-07-01"', "1372669200", "null", '"0001-01-01T00:00:00+14:00"')
        ),
        *(("decision_time", v) for v in ('"2013-07-01T05:15:00"', "null", '"9999-12-31T23:59:59-12:00"')),
    ],
)
def test_one_wrong_field_is_named(field, value):
    (problem,) = problems(body(**{field: value}))
    assert (problem["row"], problem["field"]) == (0, field)
    assert problem["problem"] and problem["expected"]


def test_missing_and_unknown_fields_are_named():
    found = problems(body(carrier=None, carier='"UA"'))
    assert [(p["field"], p["problem"]) for p in found] == [
        ("carrier", "is missing"),
        ("carier", "is not a field (did you mean 'carrier'?)"),
    ]


def test_every_wrong_field_of_every_row_is_named():
    found = problems(b"[" + b",".join([body(), body(flight='"x"', distance="NaN"), b"7", body(carrier=None)]) + b"]")
    assert [(p["row"], p["field"]) for p in found] == [(1, "flight"), (1, "distance"), (2, None), (3, "carrier")]


def test_the_list_of_problems_is_bounded():
    assert len(problems(b"[" + b",".join([b"{}"] * 1000) + b"]")) == 50


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no body"),
        (b"  \n", "no body"),
        (b"[]", "the array is empty"),
        (b"{", "is not JSON"),
        (b'{"carrier": "UA"', "is not JSON"),
        (b"\xff\xfe{}", "not UTF-8: byte 0 is 0xff"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"null", "the body"),
        (body() + b"x", "is not JSON"),
        (body(carrier='"\\ud800"'), "carrier"),
    ],
)
def test_a_body_that_is_no_request(data, says):
    with pytest.raises(RequestError, match=says):
        SCHEMA.decode(data)


def test_columns_of_many_rows_equal_those_of_each():
    rows, _ = SCHEMA.decode(
        b"[" + b",".join(body(flight=str(i), carrier=f'"{"x" * (i % 7 + 1)}"') for i in range(100)) + b"]"
    )
    together = SCHEMA.columns(rows)
    for i, row in enumerate(rows):
        assert all(np.array_equal(column[0], together[name][i]) for name, column in SCHEMA.columns([row]).items())


@pytest.mark.parametrize(
    "again", ['"flight": 1545', '"flight": 7', '"fl\\u0069ght": 7', '"decision_time": "2013-07-01T05:15:00Z"']
)
def test_a_key_that_stands_twice_is_named(again):
    once = body(decision_time='"2013-07-01T05:15:00Z"')
    found = problems(b"[" + once + b", " + once[:-1] + b", " + again.encode() + b"}]")
    name = "decision_time" if "decision" in again else "flight"
    assert [(p["row"], p["field"], p["problem"]) for p in found] == [(1, name, "is there more than once")]


def test_text_with_quotes_colons_and_escapes_is_no_key():
    for text in ('"\\\\"', '"a\\"b"', '"a:b,{}"', '"\\u0041"', '"\u00e9"'):
        rows, _ = SCHEMA.decode(
            b"[" + body(carrier=text) + b"," + body(carrier=text, decision_time='"2013-07-01T05:15:00Z"') + b"]"
        )
        assert rows[0].carrier == rows[1].carrier == json.loads(text)


@pytest.mark.parametrize("depth", [10, 500, *range(900, 1100, 7), 5000, 100_000])
@pytest.mark.parametrize("value", ["[]", '{"a": }'])
def test_a_nested_value_is_a_wrong_request_at_any_depth(depth, value):
    opened, closed = value[:-1], value[-1]
    with pytest.raises(RequestError):
        SCHEMA.decode(body(carrier=opened * depth + "1" + closed * depth))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin-1", "cp037"])
def test_another_encoding_is_refused(encoding):
    with pytest.raises(RequestError, match=r"UTF-8|JSON"):
        SCHEMA.decode(body(carrier='"\u00e9"').decode().encode(encoding))


def test_what_stands_for_a_row_in_the_log():
    plain = RequestSchema(FIELDS[:3])
    logged = lambda schema, data: schema.raw(data, *schema.decode(data))
    one = body(departure=None)
    assert [bytes(raw) for raw in logged(plain, one)] == [one]
    changed = (
        b"[" + one + b"]",
        one.replace(b" ", b"\n"),
        one + b" " * 1000,
        body(departure=None, decision_time='"2013-07-01T05:00:00Z"'),
    )
    for data in changed:
        assert logged(plain, data) == plain.decode(data)[0]
    assert logged(SCHEMA, body()) == SCHEMA.decode(body())[0]
