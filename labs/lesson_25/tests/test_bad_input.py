"""The running container against what no client should send: it answers, leaks nothing, and goes on."""

import concurrent.futures
import contextlib
import http.client
import random
import socket

import pytest

from clients import FAILURES, probe, slow_clients
from limits import AT_ONCE_SECONDS, MEMORY_LIMITS_BYTES

pytestmark = pytest.mark.engine


def send(port, request, timeout=5):
    """Return (status, headers, body) of the answer to these bytes; status 0 where the connection is just closed."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=timeout)) as connection:
        with contextlib.suppress(ConnectionError):  # closed before it was all sent
            connection.sendall(request)
        answer = http.client.HTTPResponse(connection, method=request.split(b" ")[0].decode("latin-1"))
        try:
            answer.begin()
            return answer.status, answer.headers, answer.read()
        except TimeoutError:
            raise
        except FAILURES:
            return 0, {}, b""


@pytest.fixture
def web(stack):
    """The running container; afterwards it is the same, healthy, within its memory, and has logged no traceback."""
    made = stack.container("web")
    before = made.inspect()
    lines = len(made.log().splitlines())
    yield made
    after = made.inspect()
    assert after["State"]["Pid"] == before["State"]["Pid"]
    assert (after["RestartCount"], after["State"]["OOMKilled"]) == (0, False)
    assert stack.get("/health").status == 200
    peak = made.run(
        "sh", "-c", "cat /sys/fs/cgroup/memory.peak 2>/dev/null || cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes"
    )
    assert int(peak.stdout) < MEMORY_LIMITS_BYTES["web"]
    assert made.log().splitlines()[lines:] == []


def check(answer):
    """Fail where an answer is a server's error, tells of the inside, or has a header that the client planted."""
    status, headers, body = answer
    assert status < 500
    assert b"Traceback" not in body
    assert b"/app/" not in body
    assert "x-planted" not in {name.lower() for name in headers}
    return status


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        pytest.param(b"nonsense\r\n\r\n", {400}, id="no-request-line"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}, id="tls"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", {400}, id="malformed-header"),
        pytest.param(b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", {0, 431}, id="huge-header"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 5_000 + b"\r\n", {0, 431}, id="thousands-of-headers"),
        pytest.param(b"GET /%0d%0aX-Planted:%201 HTTP/1.1\r\nHost: a\r\n\r\n", {404}, id="crlf-in-path"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", {200, 400}, id="invalid-utf-8-in-host"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", {200}, id="http-1.0"),
        pytest.param(b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", {405}, id="unknown-method"),
        pytest.param(b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + b"a" * 99_999, {405}, id="huge-body"),
    ],
)
def test_a_bad_request_gets_a_short_answer(stack, web, request_bytes, statuses):
    assert check(send(stack.port, request_bytes)) in statuses


@pytest.mark.timing
def test_two_hundred_slow_clients_keep_nobody_waiting(stack, web):
    """Each holds a connection open with half a request, and sends a byte of a header now and then."""
    with slow_clients(stack.port) as slow:
        assert max(probe(stack.port, times=20, every=0.2)) < AT_ONCE_SECONDS
        slow[0].settimeout(15)
        slow[0].recv(4096)  # raises TimeoutError where the server has not ended the connection by then


def random_request(chance):
    """Return the bytes of a request that is whole, but for what it says in its parts."""

    def noise(most):
        return bytes(chance.choices(range(256), k=chance.randrange(most))).replace(b"\n", b"").replace(b"\r", b"")

    method = chance.choice([b"GET", b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS", b"DELETE", b"TRACE", noise(8)])
    path = chance.choice(
        [b"/", b"/health", b"//health", b"/%00", b"/..%2f..%2fetc/passwd", b"/?" + noise(40), b"/" + noise(40)]
    )
    version = chance.choice([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", noise(10)])
    headers = [b"Host: " + chance.choice([b"web", b"a:99999", b"[::1", noise(20)]), b"Connection: close"]
    for _ in range(chance.randrange(4)):
        name = chance.choice(
            [b"X-Forwarded-For", b"Cookie", b"Content-Type", b"Expect", b"Range", b"X-Planted", noise(10)]
        )
        headers.append(name + b": " + noise(60))
    return b"\r\n".join([b" ".join([method, path, version]), *headers, b"", b""])


def test_ten_thousand_random_requests_do_no_harm(stack, web):
    chance = random.Random(25)
    requests = [random_request(chance) for _ in range(10_000)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda request: check(send(stack.port, request)), requests)
        statuses = []
        for number, status in enumerate(answers):
            statuses.append(status)
            if number % 500 == 0:
                assert stack.get("/health").status == 200
    assert {200, 400, 404, 405} <= set(statuses)
