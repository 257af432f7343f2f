"""Connections that are kept, and those that never get to a request."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time

import pytest

import serve
from harness import limits
from harness.clients import ask, eventually, get, probe, seconds_to, slow_clients
from harness.engine import CONTEXT, container, free_port

# The service, with shorter times than its own, so that a test need not wait for those.
WITH_SHORT_TIMES = f"""
import signal, sys
sys.path.insert(0, {str(CONTEXT)!r})
import serve
signal.pthread_sigmask(signal.SIG_BLOCK, serve.END_SIGNALS)
serve.IDLE_SECONDS, serve.KILL_SECONDS = 2, 2
serve.main()
"""


@pytest.fixture
def impatient():
    """A service that waits two seconds where it usually waits long: its process and port."""
    port = free_port()
    command = [sys.executable, "-c", WITH_SHORT_TIMES]
    process = subprocess.Popen(command, env={**os.environ, "PORT": str(port)})
    try:
        eventually(lambda: get(port, "/health"))
        yield process, port
    finally:
        process.kill()
        process.wait()


def half_a_request(port):
    """Return a connection on which a request has begun."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Unfinished: ")
    return connection


def seconds_until_closed(connection):
    """Return how long the other side takes to close. Raises TimeoutError where it does not."""
    began = time.monotonic()
    while connection.recv(4096):
        pass
    return time.monotonic() - began


def test_the_times_are_those_that_load_balancers_and_engines_expect():
    """They keep an idle connection for 60 s, and kill a service that has not ended after 10."""
    assert limits.KEPT_OPEN_SECONDS < serve.IDLE_SECONDS <= 120
    assert serve.KILL_SECONDS <= 5


def test_a_connection_is_kept_and_closed_when_it_has_been_idle_for_long(impatient):
    _, port = impatient
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as kept:
        assert ask(kept).status == ask(kept, "/health").status == 200
        assert seconds_until_closed(kept.sock) > 1, "an idle connection was closed at once"


def test_a_request_that_is_never_finished_is_given_up(impatient):
    _, port = impatient
    with half_a_request(port) as unfinished:
        assert seconds_until_closed(unfinished) > 1, "a slow request was given up at once"


def test_a_request_that_is_never_finished_holds_up_the_end_no_longer_than_is_said(impatient):
    process, port = impatient
    with half_a_request(port):
        get(port)  # by now the unfinished one has been taken, too
        process.terminate()
        try:
            assert process.wait(20) == 0
        except subprocess.TimeoutExpired:
            pytest.fail("a client that sends half a request kept the service from ending")


@pytest.mark.engine
@pytest.mark.timing
def test_two_hundred_slow_clients_keep_nobody_waiting(stack):
    """Each holds a connection open with half a request, and sends a byte of a header at times."""
    with slow_clients(stack.port):
        slowest = max(probe(stack.port, times=20, every=0.2))
    assert slowest < limits.AT_ONCE_SECONDS, f"/health took {slowest:.2f} s"


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("workers", [1, 2])
def test_four_thousand_idle_connections_are_held_and_a_new_one_is_answered_at_once(image, workers):
    """At the container's own address: the engine's proxy holds fewer."""
    options = ["--memory", str(limits.MEMORY_LIMITS_BYTES["web"])]
    with (
        contextlib.ExitStack() as idle,
        container(image, *options, "--env", f"WEB_CONCURRENCY={workers}") as web,
    ):
        address = (web.address(), 8080)
        for _ in range(limits.IDLE_CONNECTIONS):
            connection = http.client.HTTPConnection(*address, timeout=20)
            idle.callback(connection.close)
            assert ask(connection, "/health").status == 200
        waits = [seconds_to(web.port(), "/health") for _ in range(20)]
        memory = web.memory_bytes()
        first = ask(connection, "/health")
    assert max(waits) < limits.AT_ONCE_SECONDS, f"a new connection waited {max(waits):.2f} s"
    assert memory < limits.IDLE_CONNECTIONS_MEMORY_BYTES, f"{memory / 2**20:.0f} MiB"
    assert first.status == 200, "an idle connection was not kept"


@pytest.mark.engine
@pytest.mark.slow
def test_a_kept_connection_is_open_after_65_seconds_and_an_unfinished_request_is_not_for_ever(
    image,
):
    with (
        container(image) as web,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", web.port())) as kept,
        half_a_request(web.port()) as unfinished,
    ):
        assert ask(kept).status == 200
        time.sleep(limits.KEPT_OPEN_SECONDS)
        assert ask(kept).status == 200, "a load balancer's request met a closed connection"
        assert seconds_until_closed(unfinished) < 30
