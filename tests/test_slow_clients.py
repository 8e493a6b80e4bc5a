import json
import socket
import time
from urllib.parse import urlsplit

import pytest
import toy_project
from uvicorn_process import run_server
from waiting import wait_until_ready

from mlnb.serving.log_reader import read_predictions

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def serving(toy, tmp_path_factory, seconds):
    "A plain server of so much patience: its address, the folder of its log, its process"
    folder = tmp_path_factory.mktemp("predictions")
    with run_server(toy, folder, MLNB_REQUEST_TIMEOUT_SECONDS=str(seconds)) as (process, url):
        yield url, folder, process


@pytest.fixture(scope="module")
def server(toy, tmp_path_factory):
    "One second of patience"
    yield from serving(toy, tmp_path_factory, 1)


@pytest.fixture(scope="module")
def patient(toy, tmp_path_factory):
    "Twenty, for those who shall be answered even where the machine has much else to do"
    yield from serving(toy, tmp_path_factory, 20)


@pytest.fixture
def row(toy):
    return toy_project.example(toy)


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=120)


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
    "sent",
    [
        b"",
        b"POST /pre",
        HEAD,
        HEAD + b"Content-Length: 1000\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    ],
)
def test_a_caller_that_stalls_is_told_and_cut_off(server, sent):
    with connect(server[0]) as caller:
        caller.sendall(sent)
        answer = told(caller)
    assert answer.startswith(b"HTTP/1.1 408") and b"Traceback" not in answer


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x00\x01\x02\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000, b"431"),
        (HEAD + b"Content-Length: nine\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", b"4"),
    ],
)
def test_a_caller_that_talks_nonsense_is_told_and_cut_off(patient, sent, status):
    with connect(patient[0]) as caller:
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


UNREAD = (
    b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"  # answered before its body is here
)
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def answer_of(caller: socket.socket, status: bytes):
    "Read one answer, whose body is JSON, and compare its status"
    found = b""
    while not found.rstrip().endswith(b"}"):
        data = caller.recv(65536)
        assert data, found
        found += data
    assert found.startswith(b"HTTP/1.1 " + status)


@pytest.mark.long
def test_what_follows_an_answer_may_not_stall_either(patient):
    cases = {GET + b"GET /li": b"", GET: b"\r\n", UNREAD: b"{"}
    callers = [connect(patient[0]) for _ in cases]
    for caller, (first, then) in zip(callers, cases.items(), strict=True):
        caller.sendall(first)
        answer_of(caller, b"404" if first is UNREAD else b"200")
        caller.sendall(then)
    for caller in callers:
        with caller:
            assert told(caller).startswith(b"HTTP/1.1 408")


def test_who_sends_the_rest_of_a_body_that_nobody_reads_may_ask_again(patient):
    with connect(patient[0]) as caller:
        for _ in range(3):
            caller.sendall(UNREAD)
            answer_of(caller, b"404")
            caller.sendall(b" " * 1000 + GET)
            answer_of(caller, b"200")


@pytest.mark.long
def test_two_hundred_slow_callers_keep_nobody_from_an_answer(patient, row):
    body = json.dumps(row).encode()
    slow = [connect(patient[0]) for _ in range(200)]
    for number, caller in enumerate(slow):
        caller.sendall([b"POST /pre", HEAD, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[:20]][number % 3])
    assert all(toy_project.post(f"{patient[0]}/predict", json=row).status_code == 200 for _ in range(20))
    assert all(told(caller).startswith(b"HTTP/1.1 408") for caller in slow)
    for caller in slow:
        caller.close()


def test_a_caller_that_goes_away_half_way_leaves_nothing(patient, row):
    before = len(read_predictions(patient[1]))
    for _ in range(20):
        with connect(patient[0]) as caller:
            caller.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + json.dumps(row).encode()[:50])
    assert toy_project.post(f"{patient[0]}/predict", json=row).status_code == 200
    assert len(read_predictions(patient[1])) == before + 1


def test_a_slow_body_within_the_time_is_answered(patient, row):
    body = json.dumps(row).encode()
    with connect(patient[0]) as caller:
        caller.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        for part in (body[:10], body[10:50], body[50:]):
            time.sleep(0.1)
            caller.sendall(part)
        assert caller.recv(65536).startswith(b"HTTP/1.1 200")


def test_more_connections_than_the_limit_are_turned_away(toy, tmp_path):
    with run_server(toy, tmp_path, MLNB_REQUEST_TIMEOUT_SECONDS="20") as (process, url):
        held = [connect(url) for _ in range(1010)]
        refused = [told(caller) for caller in held[-5:]]
        for caller in held:
            caller.close()
        assert all(answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer for answer in refused)
        wait_until_ready(process, url)


def test_the_head_of_an_answer_does_not_tell_what_serves(patient):
    headers = toy_project.get(patient[0]).headers
    assert "server" not in headers and "x-powered-by" not in headers


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        ("http://example.org/", "Host: localhost", b"403"),  # the host of an absolute URL counts, not the header
        ("http://localhost/", "Host: example.org", b"200"),
        ("/", "Host: localhost\r\nX-Forwarded-For: 127.0.0.1", b"200"),
        ("/", "Host: localhost\r\nX-Forwarded-For: ::1", b"200"),
        ("/", "Host: localhost\r\nX-Forwarded-For: 10.1.2.3, 127.0.0.1", b"403"),
        ("/", "Host: localhost\r\nX-Forwarded-For: unknown", b"403"),
        ("/", "Host: localhost\r\nX-Forwarded-Host: example.org", b"403"),
        ("/", "Host: localhost\r\nX-Real-IP: 10.1.2.3", b"403"),
        ("/" + "a" * 70_000, "Host: localhost", b"400"),
    ],
)
def test_without_keys_who_comes_by_another_name_or_through_a_proxy_is_refused(patient, target, headers, status):
    with connect(patient[0]) as caller:
        caller.sendall(f"GET {target} HTTP/1.1\r\n{headers}\r\nConnection: close\r\n\r\n".encode())
        assert told(caller).startswith(b"HTTP/1.1 " + status)
