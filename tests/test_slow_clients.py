import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest
import toy_project
from plain_server import plain

from mlnb.serving.predictions import read

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(toy, tmp_path_factory):
    "A plain server with one second of patience, and the folder of its log"
    folder = tmp_path_factory.mktemp("predictions")
    with plain(toy, folder, MLNB_REQUEST_SECONDS="1") as (process, url):
        yield url, folder, process


@pytest.fixture
def row(toy):
    return toy_project.example(toy)


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=30)


def told(caller: socket.socket) -> bytes:
    "All that the server says until it hangs up"
    found = b""
    try:
        while data := caller.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b"408"),
        (b"POST /pre", b"408"),
        (HEAD, b"408"),
        (HEAD + b"Content-Length: 1000\r\n\r\n{", b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"408"),
        (b"\x00\x01\x02\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000, b"431"),
        (HEAD + b"Content-Length: nine\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", b"4"),
    ],
)
def test_a_caller_that_stalls_or_talks_nonsense_is_told_and_cut_off(server, sent, status):
    with connect(server[0]) as caller:
        caller.sendall(sent)
        answer = told(caller)
    assert answer.startswith(b"HTTP/1.1 " + status) and b"Traceback" not in answer


def test_a_head_that_trickles_is_cut_off(server):
    with connect(server[0]) as caller:
        try:
            for byte in (HEAD + b"X-Slow: " + b"x" * 200).decode():
                caller.sendall(byte.encode())
                time.sleep(0.02)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            assert told(caller).startswith(b"HTTP/1.1 408")


def test_a_second_request_may_stall_too(server):
    with connect(server[0]) as caller:
        caller.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET /li")
        answer = told(caller)
        assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in answer


UNREAD = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"  # answered before its body is here
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def answer_of(caller: socket.socket, status: bytes):
    "Read one answer, whose body is JSON, and compare its status"
    found = b""
    while not found.rstrip().endswith(b"}"):
        data = caller.recv(65536)
        assert data, found
        found += data
    assert found.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(("first", "then"), [(UNREAD, b"{"), (GET, b"\r\n")])
def test_a_byte_after_an_answer_does_not_keep_the_connection(server, first, then):
    with connect(server[0]) as caller:
        caller.sendall(first)
        assert caller.recv(65536).startswith(b"HTTP/1.1 ")
        caller.sendall(then)
        assert b"HTTP/1.1 408" in told(caller)


def test_who_sends_the_rest_of_a_body_that_nobody_reads_may_ask_again(server):
    with connect(server[0]) as caller:
        for _ in range(3):
            caller.sendall(UNREAD)
            answer_of(caller, b"404")
            caller.sendall(b" " * 1000 + GET)
            answer_of(caller, b"200")


def test_two_hundred_slow_callers_keep_nobody_from_an_answer(server, row):
    body = json.dumps(row).encode()
    slow = [connect(server[0]) for _ in range(200)]
    for number, caller in enumerate(slow):
        caller.sendall([b"POST /pre", HEAD, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[:20]][number % 3])
    assert all(httpx.post(f"{server[0]}/predict", json=row).status_code == 200 for _ in range(20))
    assert all(told(caller).startswith(b"HTTP/1.1 408") for caller in slow)
    for caller in slow:
        caller.close()


def test_a_caller_that_goes_away_half_way_leaves_nothing(server, row):
    before = len(read(server[1]))
    for _ in range(20):
        with connect(server[0]) as caller:
            caller.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + json.dumps(row).encode()[:50])
    assert httpx.post(f"{server[0]}/predict", json=row).status_code == 200
    assert len(read(server[1])) == before + 1


def test_a_slow_body_within_the_time_is_answered(server, row):
    body = json.dumps(row).encode()
    with connect(server[0]) as caller:
        caller.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        for part in (body[:10], body[10:50], body[50:]):
            time.sleep(0.1)
            caller.sendall(part)
        assert caller.recv(65536).startswith(b"HTTP/1.1 200")


def test_more_connections_than_the_limit_are_turned_away(toy, tmp_path):
    with plain(toy, tmp_path, MLNB_REQUEST_SECONDS="20") as (process, url):
        held = [connect(url) for _ in range(1010)]
        refused = [told(caller) for caller in held[-5:]]
        for caller in held:
            caller.close()
        assert all(answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer for answer in refused)
        toy_project.wait_until_ready(process, url)


def test_the_head_of_an_answer_does_not_tell_what_serves(server):
    headers = httpx.get(server[0]).headers
    assert "server" not in headers and "x-powered-by" not in headers
