"""Requests as bytes on a socket: what no client library sends, counted, refused or answered as RFC 9110 and 9112
say."""

import json
import re
import socket
from contextlib import suppress

import psutil
import pytest
import toy_project
from uvicorn_process import run_server, workers

KEY = "k" * 24
POST = (
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: %s\r\nContent-Type: application/json\r\n" % KEY.encode()
)
CHUNKED = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def server(toy, tmp_path_factory):
    "A service that needs a key, with a minute of patience: what is cut here is cut because it is too much"
    more = {
        "MLNB_KEYS": f"predict:{KEY}",
        "MLNB_REQUEST_TIMEOUT_SECONDS": "60",
        "MLNB_BODY_LIMIT_KB": "100",
        "MLNB_ROOT_PATH": "/models/toy",
    }
    with run_server(toy, tmp_path_factory.mktemp("predictions"), MLNB_SNAPSHOT_MAX_AGE_MINUTES="100000000", **more) as (
        process,
        url,
    ):
        yield process, int(url.rpartition(":")[2])


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def exchange(port: int, sent: bytes) -> bytes:
    "The answer to some bytes; all answers until the server hangs up, where the last request asks for that"
    with connect(port) as caller:
        caller.sendall(sent)
        answer, many = b"", sent.endswith(b"Connection: close\r\n\r\n")
        with suppress(ConnectionResetError):
            while (many or not _whole(answer)) and (data := caller.recv(65536)):
                answer += data
        return answer


def _whole(answer: bytes) -> bool:
    "Whether one answer is there to its end"
    head, _, body = answer.partition(b"\r\n\r\n")
    size = re.search(rb"content-length: (\d+)", head)
    return head != answer and len(body) >= (int(size[1]) if size else 0)


def status_of(port: int, sent: bytes) -> int:
    return int(exchange(port, sent)[9:12])


def sent_until_cut(port: int, first: bytes, each: bytes, most: int) -> int:
    "How many bytes of an endless request are taken until the connection is cut, at most `most`"
    with connect(port) as caller:
        total = 0
        with suppress(ConnectionError):
            caller.sendall(first)
            while total < most:
                caller.sendall(each)
                total += len(each)
        return total


NOWHERE = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n"
ENDLESS = {
    "trailers": (CHUNKED + b"\r\n0\r\n", b"X-Trailer: aaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 2000),
    "one trailer": (CHUNKED + b"\r\n0\r\nX: ", b"a" * 65536),
    "headers": (NOWHERE, b"X-Header: aaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 2000),
    "tiny headers": (NOWHERE, b"a:b\r\n" * 101),
    "one header": (NOWHERE + b"X: ", b"a" * 65536),
    "a request line": (b"GET /", b"a" * 65536),
    "blank lines before a request": (b"", b"\r\n" * 32768),
    "blank lines after one": (NOWHERE + b"Content-Length: 0\r\n\r\n", b"\r\n" * 32768),
    "a chunk extension": (CHUNKED + b"\r\n1;", b"a" * 65536),
    "extensions of small chunks": (CHUNKED + b"\r\n", (b"1;" + b"e" * 250 + b"\r\nx\r\n") * 256),
    "a chunk size": (CHUNKED + b"\r\n", b"0" * 65536),
    "a body without a key": (CHUNKED + b"\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "an announced body that nobody reads": (NOWHERE + b"Content-Length: 1000000000000\r\n\r\n", b" " * 65536),
    "a body of a GET": (
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000000\r\n\r\n",
        b" " * 65536,
    ),
    "a body of a wrong method": (CHUNKED.replace(b"POST", b"PUT") + b"\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "pipelined requests": (b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2500),
    "another protocol": (
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n",
        b"\x00\x01\x02\x03" * 16384,
    ),
    "after the last request": (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"\r\n" * 32768),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_request_without_end_is_cut_in_every_state_of_the_parser(server, what):
    first, each = ENDLESS[what]
    most = 64 * MEGABYTE
    assert sent_until_cut(server[1], first, each, most) < 16 * MEGABYTE  # buffers of the sockets are a part of it


def test_what_is_cut_has_not_filled_the_memory(server):
    (worker,) = workers(server[0])
    before = worker.memory_info().rss
    for first, each in ENDLESS.values():
        sent_until_cut(server[1], first, each, 64 * MEGABYTE)
    assert worker.memory_info().rss - before < 100 * MEGABYTE and psutil.pid_exists(worker.pid)


def test_small_chunks_of_a_whole_body_are_answered(server, toy):
    body = json.dumps(toy_project.example(toy)).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    padded = b" " * 60_000 + body
    assert status_of(server[1], POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) == 200
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in padded) + b"0\r\n\r\n"
    assert status_of(server[1], POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) == 200


OF_KEYS = [b"X-API-Key: " + KEY.encode(), b"Authorization: Bearer " + KEY.encode()]


@pytest.mark.parametrize(
    "trailer", [*OF_KEYS, b"Host: localhost", b"Content-Type: text/plain", b"Content-Encoding: gzip"]
)
def test_a_trailer_is_no_header(server, toy, trailer):
    body = json.dumps(toy_project.example(toy)).encode()
    framed = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n\r\n" % (len(body), body, trailer)
    without_key = POST.replace(b"X-API-Key: " + KEY.encode() + b"\r\n", b"")
    assert status_of(server[1], without_key + framed) == 401
    without_host = POST.replace(b"Host: localhost\r\n", b"")
    assert status_of(server[1], without_host + framed) == 400
    assert status_of(server[1], POST + framed) == 200


GET = b"GET / HTTP/1.1\r\nX-API-Key: %s\r\n" % KEY.encode()
LINES = {
    b"Host: localhost": 200,
    b"Host: localhost\r\nHost: localhost": 400,
    b"Host: localhost\r\nhost: example.org": 400,
    b"X-Other: 1": 400,  # no Host at all
    b"Host: local host": 400,
    b"Host: a, b": 400,
    b"Host: user@localhost": 400,
    b"Host: localhost\r\nX-API-Key: other": 400,
    b"Host: localhost\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b": 400,
    b"Host: localhost\r\nOrigin: http://a\r\nOrigin: http://b": 400,
    b"Host: localhost\r\nContent-Type: application/json\r\nContent-Type: text/plain": 400,
    b"Host: localhost\r\nContent-Encoding: gzip\r\nContent-Encoding: identity": 400,
    b"Host: localhost\r\nContent-Length: 0\r\nContent-Length: 0": 400,
    b"Host: localhost\r\nContent-Length: 0, 0": 400,
    b"Host: localhost\r\nContent-Length: +0": 400,
    b"Host: localhost\r\nContent-Length: 0\r\nTransfer-Encoding: chunked": 400,
    b"Host: localhost\r\nTransfer-Encoding: identity": 400,
    b"Host: localhost\r\nTransfer-Encoding: chunked, gzip": 400,
    b"Host: localhost\r\nX-Folded: a\r\n b": 400,
    b"Host : localhost": 400,
    b"Host: localhost\r\nX Y: 1": 400,
    b"Host: localhost\r\nX: a\x00b": 400,
    b"Host: localhost\r\nX_Y: a name with an underscore is a name": 200,
    b"Host: localhost\r\nAccept: text/html\r\nAccept: */*": 200,
    b"Host: localhost\r\n" + b"\r\n".join(b"X-%d: 1" % i for i in range(99)): 431,
}


@pytest.mark.parametrize("lines", LINES, ids=lambda lines: lines.decode("latin-1")[:60])
def test_headers_that_contradict_each_other_are_refused(server, lines):
    answer = exchange(server[1], GET + lines + b"\r\n\r\n")
    assert int(answer[9:12]) == LINES[lines], answer
    assert LINES[lines] == 200 or json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize("path", [b"/livez", b"/readyz", b"/nothing", b"/predict"])
def test_two_hosts_are_refused_on_every_path(server, path):
    assert status_of(server[1], b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n") == 400


START_LINES = {
    b"GET http://localhost/livez HTTP/1.1\r\nHost: example.org": 200,
    b"GET http://localhost HTTP/1.1\r\nHost: localhost": 401,
    b"GET ftp://localhost/livez HTTP/1.1\r\nHost: localhost": 400,
    b"OPTIONS * HTTP/1.1\r\nHost: localhost": 204,
    b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost": 405,
    b"PRI * HTTP/2.0\r\n\r\nSM": 400,
    b"GET /livez HTTP/2.0\r\nHost: localhost": 505,
    b"GET /livez HTTP/1.0": 200,
    b"GET /livez": 505,
    b"GET livez HTTP/1.1\r\nHost: localhost": 400,
    b"GET /livez HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue": 200,
}


@pytest.mark.parametrize("head", START_LINES, ids=lambda head: head.decode())
def test_forms_of_a_request_line(server, head):
    assert status_of(server[1], head + b"\r\n\r\n") == START_LINES[head]


def test_a_wish_for_another_protocol_costs_no_request_its_body(server, toy):
    body = json.dumps(toy_project.example(toy)).encode()
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    wish += b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    one = POST + wish + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = exchange(server[1], one + one + b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 3 and answer.count(b'"probability"') == 2


def test_head_is_answered_wherever_get_is_and_options_name_the_methods(server):
    rest = b" HTTP/1.1\r\nHost: a\r\nX-API-Key: %s\r\nConnection: close\r\n\r\n" % KEY.encode()
    asked = lambda method, path: exchange(server[1], method + b" " + path + rest)
    for path in (b"/livez", b"/readyz", b"/", b"/openapi.json", b"/docs.json"):
        get, head = (asked(method, path).partition(b"\r\n\r\n") for method in (b"GET", b"HEAD"))
        assert head[0] == get[0] and not head[2] and get[2]
    assert asked(b"HEAD", b"/metrics").startswith(b"HTTP/1.1 200")
    assert asked(b"HEAD", b"/predict").startswith(b"HTTP/1.1 405") and asked(b"HEAD", b"/nothing").startswith(
        b"HTTP/1.1 404"
    )
    for path, methods in {
        b"/predict": b"POST, OPTIONS",
        b"/": b"GET, HEAD, OPTIONS",
        b"/routing": b"GET, PUT, HEAD, OPTIONS",
    }.items():
        answer = asked(b"OPTIONS", path)
        assert (
            b"204 No Content" in answer and b"allow: " + methods + b"\r\n" in answer and b"content-length" not in answer
        )


def test_a_path_prefix_is_answered_with_and_without_it(server):
    key = b" HTTP/1.1\r\nHost: a\r\nX-API-Key: %s\r\nConnection: close\r\n\r\n" % KEY.encode()
    page = lambda path: json.loads(exchange(server[1], b"GET " + path + key).partition(b"\r\n\r\n")[2])
    assert page(b"/openapi.json") == page(b"/models/toy/openapi.json") and page(b"/openapi.json")["servers"] == [
        {"url": "/models/toy"}
    ]
    assert (
        page(b"/") == page(b"/models/toy") == page(b"/models/toy/")
        and page(b"/")["links"][0] == "/models/toy/openapi.json"
    )
    assert page(b"/models/toy/readyz")["ready"]
    assert all("error" in page(path) for path in (b"/models/toys/readyz", b"/models/toy/models/toy/readyz"))
    assert exchange(server[1], b"GET /models/toy/metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 401"
    )
