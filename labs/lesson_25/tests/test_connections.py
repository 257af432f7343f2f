"""Connections that are kept, and those that never get to a request."""

import concurrent.futures
import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

import serve
from harness import limits
from harness.clients import ask, eventually, get, probe, seconds_to, slow_clients
from harness.engine import CONTEXT, container, free_port
from harness.limits import PATIENCE_SECONDS
from harness.peers import counting_by, peer

# The service, with other times than its own, so that a test need not wait for those.
WITH_OTHER_TIMES = f"""
import signal, sys
sys.path.insert(0, {str(CONTEXT)!r})
import ending, serve
ending.block_end_signals()
serve.IDLE_SECONDS, serve.KILL_SECONDS = int(sys.argv[1]), float(sys.argv[2])
serve.app.WAIT_SECONDS = 20
serve.main()
"""


@contextlib.contextmanager
def service(idle_seconds=3600, kill_seconds=3600, **settings):
    """Yield the process and the port of a service with these times and settings."""
    port = free_port()
    command = [sys.executable, "-c", WITH_OTHER_TIMES, str(idle_seconds), str(kill_seconds)]
    process = subprocess.Popen(command, env={**os.environ, "PORT": str(port), **settings})
    try:
        eventually(lambda: get(port, "/health"))
        yield process, port
    finally:
        process.terminate()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def half_a_request(port):
    """Return a connection on which a request has begun."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Unfinished: ")
    return connection


def seconds_until_closed(connection, began, what):
    """Return how long after `began` the other side has closed; fail where it does not."""
    connection.settimeout(PATIENCE_SECONDS)
    closed = False
    with contextlib.suppress(TimeoutError):
        while connection.recv(4096):
            pass
        closed = True
    assert closed, f"{what} is kept for ever: still open after {PATIENCE_SECONDS} s"
    return time.monotonic() - began


def test_the_times_are_those_that_load_balancers_and_engines_expect():
    """They keep an idle connection for 60 s, and kill a service that has not ended after 10."""
    assert limits.KEPT_OPEN_SECONDS < serve.IDLE_SECONDS <= 120, (
        f"an idle connection is closed after {serve.IDLE_SECONDS} s"
    )
    assert serve.KILL_SECONDS <= 5, f"a request may hold up the end for {serve.KILL_SECONDS} s"


def test_as_many_idle_connections_are_allowed_as_are_promised():
    assert serve.MAX_CONNECTIONS > limits.IDLE_CONNECTIONS, (
        f"a worker holds {serve.MAX_CONNECTIONS} connections, of which {limits.IDLE_CONNECTIONS}"
        " may be idle ones"
    )


def test_neither_an_idle_connection_nor_an_unfinished_request_is_kept_for_ever():
    with (
        service(idle_seconds=1) as (_, port),
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as kept,
    ):
        assert ask(kept).status == 200
        began = time.monotonic()
        assert ask(kept, "/health").status == 200
        assert kept.sock, "a connection is closed with its answer, and not kept"
        with half_a_request(port) as unfinished, concurrent.futures.ThreadPoolExecutor() as pool:
            end_of_kept = pool.submit(seconds_until_closed, kept.sock, began, "an idle connection")
            end_of_unfinished = pool.submit(
                seconds_until_closed, unfinished, began, "a request that is never finished"
            )
    seconds = end_of_kept.result()
    assert seconds > 0.9, f"an idle connection was closed after {seconds:.1f} s instead of 1"
    seconds = end_of_unfinished.result()
    assert seconds > 0.9, f"a slow request was given up after {seconds:.1f} s instead of 1"


def test_a_request_that_is_never_finished_holds_up_the_end_no_longer_than_is_said():
    with service(kill_seconds=0.3) as (process, port), half_a_request(port):
        get(port)  # by now the unfinished one has been taken, too
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        status = process.returncode
    assert status == 0, f"half a request kept the service from ending: status {status}"


def test_four_hits_that_wait_for_redis_keep_nobody_else_waiting():
    asked, answered = threading.Semaphore(0), threading.Event()

    def answer_late():
        asked.release()
        answered.wait(20)
        return b":1\r\n"

    with peer(counting_by(answer_late)) as redis_port:
        settings = {
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(redis_port),
            "WEB_CONCURRENCY": "1",
        }
        with service(**settings) as (_, port), concurrent.futures.ThreadPoolExecutor() as pool:
            hits = [pool.submit(get, port, timeout=30) for _ in range(4)]
            try:
                waiting = [asked.acquire(timeout=5) for _ in hits]
                assert all(waiting), f"only {sum(waiting)} of 4 hits were taken at the same time"
                assert get(port, "/nowhere").status == 404
            finally:
                answered.set()


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
        waits = [seconds_to(web.port, "/health") for _ in range(20)]
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
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", web.port)) as kept,
        half_a_request(web.port) as unfinished,
    ):
        assert ask(kept).status == 200
        time.sleep(limits.KEPT_OPEN_SECONDS)
        assert ask(kept).status == 200, "a load balancer's request met a closed connection"
        began = time.monotonic()
        assert seconds_until_closed(unfinished, began, "a request that is never finished") < 30
