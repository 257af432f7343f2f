"""The container against what no client should send: it answers, leaks nothing, and goes on."""

import http.client
import socket

import pytest

from harness.clients import FAILURES
from harness.limits import MEMORY_LIMITS_BYTES

pytestmark = pytest.mark.engine


def without_redis(log):
    """Return the lines that do not tell of Redis, which another test may have taken away before."""
    return [line for line in log.splitlines() if "Redis" not in line]


@pytest.fixture
def web(stack):
    """The container; afterwards it is the same, within its memory, and has logged nothing."""
    made = stack.container("web")
    before, log = made.inspect(), without_redis(made.log())
    yield made
    after = made.inspect()
    assert (after["State"]["Pid"], after["RestartCount"]) == (before["State"]["Pid"], 0)
    assert stack.get("/health").status == 200
    version_2, version_1 = "memory.peak", "memory/memory.max_usage_in_bytes"  # of cgroups
    read = f"cd /sys/fs/cgroup && cat {version_2} 2>/dev/null || cat {version_1}"
    most_bytes = int(made.run("sh", "-c", read).stdout)
    assert most_bytes < MEMORY_LIMITS_BYTES["web"]
    new = without_redis(made.log())[len(log) :]
    assert not new, f"a client can fill the log: {new}"


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        pytest.param(b"nonsense\r\n\r\n", {400}, id="no-request-line"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}, id="tls"),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", {400}, id="malformed-header"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", {0, 431}, id="huge-header"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 5_000 + b"\r\n",
            {0, 431},
            id="thousands-of-headers",
        ),
        pytest.param(
            b"GET /%0d%0aX-Planted:%201 HTTP/1.1\r\nHost: a\r\n\r\n", {404}, id="crlf-in-path"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", {200, 400}, id="invalid-utf-8-in-host"
        ),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", {200}, id="http-1.0"),
        pytest.param(b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", {405}, id="unknown-method"),
        pytest.param(
            b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + b"a" * 99_999,
            {405},
            id="huge-body",
        ),
    ],
)
def test_a_bad_request_gets_a_short_answer(stack, web, request_bytes, statuses):
    with socket.create_connection(("127.0.0.1", stack.port), timeout=5) as connection:
        answer = http.client.HTTPResponse(connection, method="GET")
        try:
            connection.sendall(request_bytes)
            answer.begin()
            body = answer.read()
        except TimeoutError:
            raise
        except FAILURES:  # it was closed before all was sent, or without an answer
            assert 0 in statuses
            return
    assert answer.status in statuses, f"it is answered with {answer.status}, not one of {statuses}"
    assert len(body) < 400 and b"Traceback" not in body and b"/app/" not in body
    assert answer.headers["X-Planted"] is None
