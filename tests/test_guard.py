import asyncio
import json
import time

import pytest
import toy_project

from mlnb.data.snapshot_store import SnapshotStore
from mlnb.models.bundle import Bundle
from mlnb.project.errors import ServingError, SettingError
from mlnb.project.settings import Settings, load_settings
from mlnb.serving.app import create_app
from mlnb.serving.guard import ApiKeys, Guard, Limits, is_loopback, load_api_keys
from mlnb.serving.log_reader import read_predictions
from mlnb.serving.messages import HttpError
from mlnb.serving.microbatcher import MicroBatcher
from mlnb.serving.predictions import PredictionLog

PREDICT, ADMIN = "p" * 20, "a" * 40
KEYS = ApiKeys(f"predict:{PREDICT},\nadmin:{ADMIN}\n")


@pytest.fixture
def make(toy, tmp_path):
    "Makes the application with a log in `tmp_path`"

    def make(**more):
        store = SnapshotStore(str(toy / ".mlnb/storage/context"))
        return create_app(Bundle.load(toy / "products/bundle"), store, PredictionLog(tmp_path), 60, **more)

    return make


@pytest.fixture
def body(toy):
    return json.dumps(toy_project.example(toy)).encode()


async def call(app, *parts: bytes, method="POST", path="/predict", server=("127.0.0.1", 80), **headers):
    "Status, headers and JSON body of the answer to a request whose body comes in `parts`"
    sent, left = [], list(parts or [b""])

    async def receive():
        await asyncio.sleep(0)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await app({"type": "http", "method": method, "path": path, "headers": pairs, "server": server}, receive, send)
    told = sent[1]["body"]
    return (
        sent[0]["status"],
        dict(sent[0]["headers"]),
        json.loads(told) if told.startswith((b"{", b"[")) else told.decode(),
    )


def ask(app, *parts, **more):
    return asyncio.run(call(app, *parts, **more))


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"x_api_key": ""},
        {"x_api_key": PREDICT[:-1]},
        {"x_api_key": f" {PREDICT}"},
        {"authorization": PREDICT},
        {"authorization": f"Basic {PREDICT}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \u00e9"},
    ],
)
def test_without_a_valid_key_nothing_is_told(make, body, header, tmp_path):
    for method, path in [
        ("POST", "/predict"),
        ("POST", "/predict/columns"),
        ("GET", "/"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
    ]:
        status, headers, answer = ask(make(keys=KEYS), body, method=method, path=path, **header)
        assert status == 401 and headers[b"www-authenticate"] == b"Bearer" and list(answer) == ["error"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "header", [{"x_api_key": PREDICT}, {"authorization": f"bearer {PREDICT}"}, {"authorization": f"Bearer {ADMIN}"}]
)
def test_a_key_opens(make, body, header):
    app = make(keys=KEYS)
    assert ask(app, body, **header)[0] == ask(app, method="GET", path="/metrics", **header)[0] == 200


def test_probes_need_no_key(make):
    app = make(keys=KEYS)
    assert ask(app, method="GET", path="/livez")[0] == ask(app, method="GET", path="/readyz")[0] == 200


def test_roles():
    guard = Guard(KEYS, Limits())
    guard.admit({}, {b"x-api-key": ADMIN.encode()}, "admin")
    with pytest.raises(HttpError, match="role 'admin'") as e:
        guard.admit({}, {b"x-api-key": PREDICT.encode()}, "admin")
    assert e.value.status == 403


def test_without_keys_only_this_machine_is_answered(make, body):
    for host in ("127.0.0.1", "127.8.8.8", "::1"):
        assert ask(make(), body, server=(host, 80))[0] == 200
    for host in ("10.1.2.3", "0.0.0.0", "::ffff:10.1.2.3", "example.org"):
        assert ask(make(), body, server=(host, 80))[0] == 403 and not is_loopback(host)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:3000"}, 200),
        ({"host": "localhost", "origin": "http://localhost:8888"}, 200),
        ({"host": "[::1]:3000", "origin": "http://127.0.0.1:8888"}, 200),
        ({"host": "127.0.0.1:3000", "origin": "https://example.org"}, 403),
        ({"host": "127.0.0.1:3000", "origin": "https://127.0.0.1.example.org"}, 403),
        ({"host": "127.0.0.1:3000", "origin": "null"}, 403),
        ({"host": "example.org:3000"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
    ],
)
def test_without_keys_no_page_from_elsewhere_is_answered(make, body, headers, status):
    app = make()
    assert ask(app, body, **headers)[0] == ask(app, method="GET", path="/metrics", **headers)[0] == status
    assert ask(app, method="PUT", path="/routing", **headers)[0] == (403 if status == 403 else 409)
    assert ask(make(keys=KEYS), body, x_api_key=PREDICT, **headers)[0] == 200


def test_several_keys_of_a_role_so_that_one_can_be_replaced():
    keys = ApiKeys(f"predict:{'o' * 20},predict:{'n' * 20}")
    assert keys.role(b"o" * 20) == keys.role(b"n" * 20) == "predict"


def test_a_key_may_hold_a_colon():
    assert ApiKeys(f"admin:a:b{ADMIN}").role(f"a:b{ADMIN}".encode()) == "admin"


@pytest.mark.parametrize("written", ["", " , ", PREDICT, f"root:{PREDICT}", "predict:", "predict:short"])
def test_keys_that_are_none_are_named_and_not_repeated(written):
    with pytest.raises(ServingError, match="MLNB_KEYS") as e:
        ApiKeys(written)
    assert PREDICT not in str(e.value) and "short" not in str(e.value)


def test_where_keys_come_from(tmp_path, monkeypatch):
    settings = Settings(root=tmp_path, name="x")
    monkeypatch.delenv("MLNB_KEYS", raising=False)
    with pytest.raises(ServingError, match="no API key is set"):
        load_api_keys(settings)
    monkeypatch.setenv("MLNB_KEYS_FILE", str(tmp_path / "keys"))
    with pytest.raises(ServingError, match="cannot be read"):
        load_api_keys(settings)
    (tmp_path / "keys").write_text(f"predict:{PREDICT}\n")
    assert load_api_keys(settings, "0.0.0.0").role(PREDICT.encode()) == "predict"
    monkeypatch.setenv("MLNB_KEYS", f"admin:{ADMIN}")
    assert load_api_keys(settings, "0.0.0.0").role(ADMIN.encode()) == "admin"


NO_KEYS = ["", " ", ",", "\n\n", "# predict:" + PREDICT, "\ufeff", "# a, b\n\n  # c"]


@pytest.mark.parametrize("written", NO_KEYS)
def test_keys_that_are_set_and_empty_never_mean_that_none_are_needed(tmp_path, monkeypatch, written):
    settings = Settings(root=tmp_path, name="x", keys_required=False)
    monkeypatch.delenv("MLNB_KEYS", raising=False)
    (tmp_path / "keys").write_text(written, "utf-8")
    monkeypatch.setenv("MLNB_KEYS_FILE", str(tmp_path / "keys"))
    with pytest.raises(ServingError, match=r"MLNB_KEYS_FILE = .* holds no key"):
        load_api_keys(settings)
    monkeypatch.setenv("MLNB_KEYS", written.replace("\ufeff", ""))
    with pytest.raises(ServingError, match="MLNB_KEYS holds no key"):
        load_api_keys(settings)


@pytest.mark.parametrize("content", [None, b"\xff\xfep\x00r\x00", "folder", "nothing named"])
def test_a_file_of_keys_that_cannot_be_read_stops_the_start(tmp_path, monkeypatch, content):
    path = tmp_path / "keys"
    path.mkdir() if content == "folder" else content and path.write_bytes(
        content if isinstance(content, bytes) else b""
    )
    monkeypatch.delenv("MLNB_KEYS", raising=False)
    monkeypatch.setenv("MLNB_KEYS_FILE", "" if content == "nothing named" else str(path))
    with pytest.raises(ServingError, match=r"MLNB_KEYS_FILE = .* cannot be read"):
        load_api_keys(Settings(root=tmp_path, name="x", keys_required=False))


def test_a_file_of_keys_as_editors_write_it(tmp_path, monkeypatch):
    monkeypatch.delenv("MLNB_KEYS", raising=False)
    monkeypatch.setenv("MLNB_KEYS_FILE", str(tmp_path / "keys"))
    (tmp_path / "keys").write_bytes(f"\ufeff# of July, who asks\r\npredict:{PREDICT}\r\n\r\nadmin:{ADMIN}".encode())
    keys = load_api_keys(Settings(root=tmp_path, name="x"))
    assert keys.role(PREDICT.encode()) == "predict" and keys.role(ADMIN.encode()) == "admin"


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (f"predict:{PREDICT} {PREDICT}", "blanks"),
        (f"predict:{PREDICT}\t{PREDICT}", "blanks"),
        (f"predict:{PREDICT}\u00e9", "ASCII"),
        (f"predict:{PREDICT}\x7f", "ASCII"),
        (f"predict:{PREDICT},admin:{PREDICT}", "two roles"),
    ],
)
def test_a_key_that_could_not_be_sent_or_is_ambiguous_is_refused(written, says):
    with pytest.raises(ServingError, match=says) as e:
        ApiKeys(written)
    assert PREDICT not in str(e.value)


PAGE = "https://app.example.org"


def test_pages_of_the_origins_that_are_set_may_ask(make, body):
    app = make(keys=KEYS, cors_origins=(PAGE, "http://localhost:5173"))
    wanted = {"access_control_request_method": "POST", "access_control_request_headers": "x-api-key,content-type"}
    status, headers, _ = ask(app, method="OPTIONS", origin=PAGE, **wanted)
    assert status == 200 and headers[b"access-control-allow-origin"] == PAGE.encode() and b"Origin" in headers[b"vary"]
    assert (
        b"X-API-Key" in headers[b"access-control-allow-headers"] and b"access-control-allow-credentials" not in headers
    )
    assert ask(app, method="OPTIONS", origin="https://example.org", **wanted)[0] == 400
    for key, expected in ({"x_api_key": PREDICT}, 200), ({}, 401):
        status, headers, _ = ask(app, body, origin=PAGE, **key)
        assert (
            status == expected
            and headers[b"access-control-allow-origin"] == PAGE.encode()
            and headers[b"vary"] == b"Origin"
        )
    status, headers, _ = ask(app, body, origin="https://example.org", x_api_key=PREDICT)
    assert status == 200 and b"access-control-allow-origin" not in headers
    assert b"access-control-allow-origin" not in ask(make(keys=KEYS), body, origin=PAGE, x_api_key=PREDICT)[1]


def test_without_keys_no_setting_lets_a_page_from_elsewhere_ask(make, body, tmp_path, monkeypatch):
    assert ask(make(cors_origins=(PAGE, "*")), body, origin=PAGE, host="localhost")[0] == 403
    local = ask(make(cors_origins=("http://localhost:5173",)), body, origin="http://localhost:5173", host="localhost")
    assert local[0] == 200 and local[1][b"access-control-allow-origin"] == b"http://localhost:5173"
    monkeypatch.delenv("MLNB_KEYS", raising=False)
    for origin in (PAGE, "*"):
        with pytest.raises(ServingError, match="cors_origins lets pages of"):
            load_api_keys(Settings(root=tmp_path, name="x", keys_required=False, cors_origins=(origin,)))
    assert (
        load_api_keys(Settings(root=tmp_path, name="x", keys_required=False, cors_origins=("http://localhost:5173",)))
        is None
    )


@pytest.mark.parametrize(
    "variable", ["CORS_ORIGINS=app.example.org", "CORS_ORIGINS=https://a/b", "ROOT_PATH=models", "ROOT_PATH=/a/"]
)
def test_origins_and_prefixes_of_another_form_are_refused(toy, monkeypatch, variable):
    monkeypatch.setenv(*f"MLNB_{variable}".split("="))
    with pytest.raises(SettingError, match=variable.partition("=")[2]):
        load_settings(toy)


def test_what_utf8_does_not_have_is_escaped_in_an_answer(make, body):
    app = make()

    def fail(*_):
        raise HttpError(503, "the model says \ud800")

    app.predictions.rows._predict = fail
    assert ask(app, body)[::2] == (503, {"error": "the model says \ud800"})
    status, _, answer = ask(make(), b'{"\\ud800": 1, "x": 2}')
    assert status == 400 and "\ud800" in answer["fields"][-2]["field"]


def test_a_body_over_the_limit_is_refused_before_the_rest_is_read(make):
    app, parts = make(limits=Limits(max_body_bytes=100)), [b" " * 60] * 10
    status, headers, answer = ask(app, *parts)
    assert status == 413 and headers[b"connection"] == b"close" and answer["body_limit_bytes"] == 100
    assert ask(app, b"{}", content_length="9" * 5000)[0] == 413
    assert ask(app, b"{}", content_length="-1")[0] == 400  # no number: the body itself is counted
    assert app.guard.bytes_in_flight == 0


def test_bodies_that_arrive_share_one_allowance(make):
    app = make(limits=Limits(max_body_bytes=100, max_queued_requests=2, timeout_seconds=60))

    async def stalled():
        sent = asyncio.Event()

        async def receive():
            if sent.is_set():
                await asyncio.sleep(60)
            sent.set()
            return {"type": "http.request", "body": b" " * 90, "more_body": True}

        return await app.guard.body({}, receive)

    async def main():
        first = [asyncio.create_task(stalled()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(HttpError, match="too many requests") as e:
            await stalled()
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        return e.value.status, app.guard.bytes_in_flight

    assert asyncio.run(main()) == (503, 0)


def test_requests_beyond_the_limit_are_told_to_come_again(make, body, tmp_path):
    app = make(limits=Limits(max_queued_requests=8))

    async def main():
        return await asyncio.gather(*(call(app, body) for _ in range(50)))

    answers = asyncio.run(main())
    assert sorted(a[0] for a in answers) == [200] * 8 + [503] * 42
    assert all(a[1][b"retry-after"] == b"1" for a in answers if a[0] == 503)
    assert len(read_predictions(tmp_path)) == 8 and app.predictions.rows.queue == []
    assert ask(app, body)[0] == 200


async def late(app):
    return await app.predictions.rows([None], -1e6)  # came long ago


def test_a_request_that_waited_too_long_is_not_predicted(make, body, tmp_path):
    assert ask(make(limits=Limits(timeout_seconds=1e-9)), body)[0] in (408, 504)
    app = make(limits=Limits(timeout_seconds=60))
    with pytest.raises(HttpError, match="waited longer than 60 seconds"):
        asyncio.run(late(app))
    assert not list(tmp_path.iterdir())


def test_one_that_came_too_late_and_went_away_keeps_no_other_waiting():
    async def main():
        together, now = MicroBatcher(lambda rows: rows, Limits(timeout_seconds=60)), time.perf_counter()
        gone, other = asyncio.create_task(together([1], now - 100)), asyncio.create_task(together([2], now))
        await asyncio.sleep(0)  # both wait for their turn
        gone.cancel()
        return await asyncio.wait_for(other, 60)

    assert asyncio.run(main()) == [2]


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/csv"},
        {"content_type": "application/json; charset=latin-1"},
        {"content_type": "application/vnd.apache.arrow.file"},
        {"content_encoding": "gzip"},
        {"content_type": ""},
    ],
)
def test_another_form_of_body_is_415(make, body, headers):
    assert ask(make(), body, **headers)[0] == 415


def test_what_became_of_requests_is_counted(make, body):
    app = make(keys=KEYS, limits=Limits(max_body_bytes=1000))
    for parts, key in [(body, PREDICT), (b"{}", PREDICT), (b" " * 2000, PREDICT), (body, "x")]:
        ask(app, parts, x_api_key=key)
    text = ask(app, method="GET", path="/metrics", x_api_key=ADMIN)[2]
    for status, validity in [(200, "valid"), (400, "invalid"), (413, "unread"), (401, "unread")]:
        assert f'mlnb_requests_total{{status="{status}",validity="{validity}"}} 1.0' in text


def test_an_unready_service_does_not_tell_its_folders(make, tmp_path, capsys):
    app = make()
    app.predictor.log.folder = app.predictor.log._files.folder = tmp_path / "file" / "log"
    (tmp_path / "file").write_text("in the way")
    status, _, answer = ask(app, method="GET", path="/readyz")
    assert status == 503 and str(tmp_path) not in str(answer) and str(tmp_path) in capsys.readouterr().err
