import json
import struct
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import toy_project
from test_guard import ask, make  # noqa: F401

from mlnb.data.fields import Field
from mlnb.models.bundle import Bundle
from mlnb.serving import row_validation
from mlnb.serving.app import ARROW
from mlnb.serving.column_validation import ArrowColumns, JsonColumns
from mlnb.serving.labels import LabelDecoder
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.row_validation import RequestError, RequestSchema

parse_labels = LabelDecoder().labels

FIELDS = (
    Field("carrier", "string", "Airline", "UA", max_length=100),
    Field("flight", "integer", "Flight number", 1545),
    Field("distance", "number", "Miles", 1400.0),
    Field("departure", "time", "Scheduled departure", "2013-07-01T05:15:00-04:00"),
)
TIME = pa.timestamp("us", "UTC")
AT = datetime(2013, 7, 1, 9, 15, tzinfo=UTC)
RIGHT = {
    "carrier": pa.array(["UA", "B6"]),
    "flight": pa.array([1, 2], pa.int64()),
    "distance": pa.array([1400.0, 200.5]),
    "departure": pa.array([AT, AT], TIME),
}
JSON = {
    "carrier": ["UA", "B6"],
    "flight": [1, 2],
    "distance": [1400, 200.5],
    "departure": ["2013-07-01T05:15:00-04:00"] * 2,
}


def stream(columns, **options) -> bytes:
    "An Arrow IPC stream of named columns, or of pairs of a name and a column"
    pairs = list(columns.items()) if isinstance(columns, dict) else columns
    table = pa.Table.from_arrays([c for _, c in pairs], [n for n, _ in pairs])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def wrong(decode, body: bytes) -> list[tuple]:
    with pytest.raises(RequestError) as e:
        decode(body)
    return [(p["row"], p["field"]) for p in e.value.fields]


arrow, columns = ArrowColumns(FIELDS).decode, JsonColumns(FIELDS).decode


LOGGED = {"carrier": "string", "flight": "int64", "distance": "double", "departure": "timestamp[s]"}


def same(a, b):
    return list(a) == list(b) and all(a[k].dtype.kind == b[k].dtype.kind and np.array_equal(a[k], b[k]) for k in a)


def test_the_three_forms_give_the_same_columns():
    schema = RequestSchema(FIELDS)
    rows = [dict(zip(JSON, values, strict=True)) for values in zip(*JSON.values(), strict=True)]
    expected = schema.columns(schema.decode(json.dumps(rows).encode())[0])
    found = arrow(stream(RIGHT)), columns(json.dumps(JSON).encode())
    assert all(same(table.columns, expected) for table in found)
    assert found[0].logged == found[1].logged and {n: str(a.type) for n, a in found[0].logged.items()} == LOGGED


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("carrier", k) for k in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))),
        *(("flight", k) for k in (pa.int8(), pa.uint16(), pa.uint64())),
        *(("distance", k) for k in (pa.float32(), pa.int32())),
        *(
            ("departure", pa.timestamp(unit, zone))
            for unit, zone in [("s", "UTC"), ("ns", "America/New_York"), ("ms", "+02:00")]
        ),
    ],
)
def test_every_arrow_type_that_holds_a_field_exactly(name, kind):
    given = RIGHT[name] if name != "distance" else pa.array([1400.0, 200.0])
    found = arrow(stream(RIGHT | {name: given.cast(kind)}))
    wanted = arrow(stream(RIGHT | {name: given}))
    assert same(found.columns, wanted.columns) and found.logged == wanted.logged


@pytest.mark.parametrize(
    ("name", "column", "rows"),
    [
        *(("carrier", pa.array(["UA", v]), [1]) for v in (None, "", "a\x1f", "\x7f", "a\x00", "x" * 101)),
        *(
            ("carrier", pa.array(["UA", v]).cast(kind), [1])
            for v in (None, "", "x" * 101, "x" * 500)
            for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
        ),
        ("carrier", pa.array(["UA", "B6"]).cast(pa.dictionary(pa.int8(), pa.string_view())), [None]),
        *(("distance", pa.array([v, 1.0]), [0]) for v in (None, float("nan"), float("inf"), float("-inf"))),
        *(
            ("flight", pa.array([1, v], kind), [1])
            for v, kind in [(None, pa.int64()), (2**53 + 1, pa.int64()), (2**64 - 1, pa.uint64())]
        ),
        ("departure", pa.array([AT, None], TIME), [1]),
        ("departure", pa.array([2**60, 0], TIME), [0]),
        ("departure", pa.array([-(2**60), 0], pa.timestamp("s", "UTC")), [0]),
        ("departure", pa.array([AT, AT], pa.timestamp("us")), [None]),
        ("departure", pa.array(JSON["departure"]), [None]),
        ("carrier", pa.array([1, 2]), [None]),
        ("carrier", pa.array([b"UA", b"B6"]), [None]),
        ("carrier", pa.array([None, None]), [None]),
        ("carrier", pa.array([["UA"], ["B6"]]), [None]),
        ("flight", pa.array([1.0, 2.0]), [None]),
        ("flight", pa.array([True, False]), [None]),
        ("distance", pa.array(["1.5", "2"]), [None]),
        ("decision_time", pa.array([None, AT], TIME), [0]),
    ],
)
def test_a_wrong_arrow_column_is_named_with_its_rows(name, column, rows):
    assert wrong(arrow, stream(RIGHT | {name: column})) == [(row, name) for row in rows]


@pytest.mark.parametrize(
    ("name", "column", "rows"),
    [
        ("carrier", ["UA", None], [1]),
        ("carrier", [1, 2], [0, 1]),
        ("flight", [1.5, 2], [0]),
        ("distance", ["1", 2], [0]),
        ("distance", 7, [None]),
        ("departure", ["2013-07-01T05:15:00", "x"], [0, 1]),
        ("departure", ["2013-07-01T05:15:00Z", "1000-01-01T00:00:00Z"], [1]),
        ("distance", [1.0], [None]),
        ("decision_time", ["2013-07-01T05:15:00Z"], [None]),
    ],
)
def test_a_wrong_json_column_is_named_with_its_rows(name, column, rows):
    assert wrong(columns, json.dumps(JSON | {name: column}).encode()) == [(row, name) for row in rows]


def test_missing_unknown_and_repeated_columns_are_named():
    pairs = [(n, c) for n, c in RIGHT.items() if n != "flight"] + [
        ("carrier", RIGHT["carrier"]),
        ("tail", RIGHT["carrier"]),
    ]
    assert wrong(arrow, stream(pairs)) == [(None, "flight"), (None, "carrier"), (None, "tail")]
    twice = (
        json.dumps({k: v for k, v in JSON.items() if k != "flight"} | {"tail": [1, 2]})[:-1]
        + ', "carrier": ["UA", "B6"]}'
    )
    assert wrong(columns, twice.encode()) == [(None, "flight"), (None, "carrier"), (None, "tail")]
    again = json.dumps(JSON)[:-1] + ', "carrier": ["AA", "B6"]}'
    assert (
        wrong(columns, again.encode())
        == wrong(columns, again.replace('"AA"', '"\\u0041A"').encode())
        == [(None, "carrier")]
    )


def test_of_many_unknown_names_only_those_that_are_told_are_looked_up(monkeypatch):
    looked_up = []
    monkeypatch.setattr(row_validation, "did_you_mean", lambda name, known: looked_up.append(name) or "")
    body = json.dumps({f"departure{i}": 0 for i in range(42_000)}).encode()
    for decode in (columns, RequestSchema(FIELDS).decode, parse_labels):
        assert len(wrong(decode, body)) == row_validation.MAX_PROBLEMS
    assert len(looked_up) == 3 * (row_validation.MAX_PROBLEMS + 1)


@pytest.mark.parametrize("rows", [3, 1000])
def test_the_first_wrong_rows_of_a_column_are_named_and_whether_there_are_more(rows):
    many = {name: pa.concat_arrays([column] * 500) for name, column in RIGHT.items()}
    distances = np.where(np.arange(1000) < rows, np.nan, 1.0)
    in_arrow = stream(many | {"distance": pa.array(distances)})
    in_json = json.dumps(
        {name: column * 500 for name, column in JSON.items()} | {"distance": distances.tolist()}
    ).encode()
    for decode, body in ((arrow, in_arrow), (columns, in_json)):
        with pytest.raises(RequestError) as e:
            decode(body)
        assert [(p["row"], p["field"]) for p in e.value.fields] == [(i, "distance") for i in range(3)]
        assert ["further rows" in p["problem"] for p in e.value.fields] == [False, False, rows > 3]


@pytest.mark.parametrize(
    "problems", [row_validation.MAX_PROBLEMS, row_validation.MAX_PROBLEMS + 1, 4 * row_validation.MAX_PROBLEMS]
)
def test_an_answer_that_names_the_first_problems_says_whether_there_are_more(problems):
    row = {name: column[0] for name, column in JSON.items()}
    bodies = {
        columns: JSON | {f"other{i}": [1, 2] for i in range(problems)},
        RequestSchema(FIELDS).decode: [row | {"flight": "x"}] * problems,
        parse_labels: [{"entity": "UA/1", "value": 2}] * problems,
    }
    for decode, document in bodies.items():
        with pytest.raises(RequestError) as e:
            decode(json.dumps(document).encode())
        assert len(e.value.fields) == row_validation.MAX_PROBLEMS and ("there are more" in str(e.value)) == (
            problems > row_validation.MAX_PROBLEMS
        )


def test_batches_whose_dictionaries_differ_are_one_column():
    texts = [[f"{letter}{i}" for i in range(100)] for letter in "ab"]
    carrier = pa.chunked_array([pa.array(some).cast(pa.dictionary(pa.int8(), pa.string())) for some in texts])
    found = arrow(
        stream(
            {name: carrier if name == "carrier" else pa.concat_arrays([column] * 100) for name, column in RIGHT.items()}
        )
    )
    assert found.columns["carrier"].tolist() == found.logged["carrier"].to_pylist() == texts[0] + texts[1]


def repeated(size: int, rows: int, views: bool = False) -> bytes:
    "A stream in which each row names the same text of `size` letters"
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["x" * size]))
    if views:
        view = struct.pack("<i4sii", size, b"xxxx", 0, 0)
        column = pa.Array.from_buffers(
            pa.string_view(), rows, [None, pa.py_buffer(view * rows), pa.py_buffer(b"x" * size)]
        )
    return stream({"carrier": column})


def with_a_compressed_dictionary() -> bytes:
    "A stream whose rows are not compressed, while the dictionary that they name is"
    carrier = {"carrier": RIGHT["carrier"].cast(pa.dictionary(pa.int8(), pa.string()))}
    plain, packed = (
        list(pa.ipc.MessageReader.open_stream(stream(RIGHT | carrier, compression=kind))) for kind in (None, "zstd")
    )
    assert [message.type for message in plain] == ["schema", "dictionary", "record batch"]
    return (
        b"".join(message.serialize().to_pybytes() for message in (plain[0], packed[1], plain[2]))
        + b"\xff" * 4
        + bytes(4)
    )


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param(repeated(900_000, 3000), "wrong in: .*carrier", id="a dictionary that stands for 2.7 GB"),
        pytest.param(repeated(900_000, 3000, views=True), "wrong in: .*carrier", id="views that stand for 2.7 GB"),
        pytest.param(
            repeated(400, 5_400_000), "'carrier' stands for 2160000000 bytes", id="rows that are right, and too many"
        ),
        pytest.param(with_a_compressed_dictionary(), "is compressed", id="only the dictionary is compressed"),
        (b"", "not an Arrow IPC stream"),
        (b"carrier,flight\n", "not an Arrow IPC stream"),
        (stream(RIGHT)[:200], "not an Arrow IPC stream"),
        (stream(RIGHT)[:-100], "not an Arrow IPC stream"),
        (b"ARROW1\0\0" + stream(RIGHT), "not an Arrow IPC stream"),
        (stream(RIGHT, compression="zstd"), "is compressed"),
        (stream(RIGHT, compression="lz4"), "is compressed"),
        (stream({n: c.slice(0, 0) for n, c in RIGHT.items()}), "no rows"),
        (stream({}), "wrong in: carrier, flight"),
    ],
)
def test_a_body_that_is_no_table(body, says):
    with pytest.raises(RequestError, match=says):
        arrow(body)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"7", b"{", b"{}", b'{"carrier": {}}', b"[" * 100_000, b'{"carrier":' * 5000, b"\xff"]
)
def test_a_body_that_is_no_object_of_columns(body):
    with pytest.raises(RequestError):
        columns(body)
    assert wrong(columns, json.dumps({name: [] for name in JSON}).encode()) == []


def test_a_damaged_stream_is_refused_and_never_crashes():
    body, rng = stream(RIGHT), np.random.default_rng(0)
    for _ in range(3000):
        damaged = bytearray(body)
        for at in rng.integers(0, len(body), rng.integers(1, 5)):
            damaged[at] = rng.integers(0, 256)
        try:
            found = arrow(bytes(damaged))
        except RequestError:
            continue
        assert (
            set(found.columns) >= set(RIGHT)
            and len({len(c) for c in (*found.columns.values(), *found.logged.values())}) == 1
        )


def test_tables_are_answered_and_logged_as_rows_are(make, toy, tmp_path):  # noqa: F811
    bundle, app = Bundle.load(toy / "products/bundle"), make()
    row_validation = bundle.samples["requests"]
    table = {name: [r[name] for r in row_validation] for name in row_validation[0]}
    rows = ask(app, json.dumps(row_validation).encode())[2]
    found = ask(app, json.dumps(table).encode(), path="/predict/columns")[2]
    assert found["probability"] == bundle.samples["outputs"]["probability"] and list(found) == list(rows[0])
    times = {n: pa.array([datetime.fromisoformat(t) for t in table[n]], TIME) for n in ("departure", "decision_time")}
    answer = ask_arrow(app, stream({n: pa.array(v) for n, v in table.items()} | times))
    assert answer["probability"].to_pylist() == bundle.samples["outputs"]["probability"]
    assert answer["decision"].to_pylist() == bundle.samples["outputs"]["decision"]
    assert answer["context_moment"].to_pylist() == [a["context_moment"] for a in rows]
    logged = read_predictions(tmp_path).set_index("request_id")
    for ids in ([a["request_id"] for a in rows], found["request_id"], answer["request_id"].to_pylist()):
        one = logged.loc[ids].reset_index(drop=True).drop(columns=["latency_ms", "logged_at"])
        first = (
            logged.loc[[a["request_id"] for a in rows]].reset_index(drop=True).drop(columns=["latency_ms", "logged_at"])
        )
        assert one.equals(first)


def test_without_decision_times_the_decision_is_now(make, toy):  # noqa: F811
    row = {k: [v] for k, v in toy_project.example(toy).items() if k != "decision_time"}
    status, _, answer = ask(make(), json.dumps(row).encode(), path="/predict/columns")
    assert status == 503 and "days old" in answer["error"]


def ask_arrow(app, body: bytes):
    "The table that answers an Arrow stream"
    import asyncio

    sent = []

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [(b"content-type", ARROW)]}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 200 and (b"content-type", ARROW) in sent[0]["headers"]
    return pa.ipc.open_stream(sent[1]["body"]).read_all()
