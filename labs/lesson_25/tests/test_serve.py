"""`python serve.py` as a process: its log, its workers, its connections and its stop."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from harness.clients import FAILURES, ask, counted, eventually, get
from harness.engine import CONTEXT, free_port
from harness.limits import PATIENCE_SECONDS
from harness.peers import patient_url, peer

COMMAND = [sys.executable, CONTEXT / "serve.py"]
FAILED = "Redis failed, hits are not counted: "
BACK = "Redis is back, hits are counted again"


def changed_by(statements):
    """Return a command that starts the service after these statements have changed it."""
    program = f"""
import sys
sys.path.insert(0, {str(CONTEXT)!r})
import app, granian.http, serve
{statements}
serve.main()
"""
    return [sys.executable, "-c", program]


@dataclasses.dataclass
class Service:
    """A running service, which writes to the file `log`."""

    process: subprocess.Popen
    port: int
    log: pathlib.Path

    def lines(self, words=""):
        """Return the lines of the log with these words."""
        return [line for line in self.log.read_text().splitlines() if words in line]

    def workers(self):
        """Return the process IDs of the workers."""
        pid = self.process.pid
        return list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@contextlib.contextmanager
def running(log, command=COMMAND, **settings):
    """Start a service of one worker, wait until it serves, and yield it; stop it afterwards."""
    port = free_port()
    environment = {**os.environ, "PORT": str(port), "WEB_CONCURRENCY": "1", **settings}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    service = Service(process, port, log)

    def serves():
        assert process.poll() is None, f"the service has exited: {service.lines()}"
        return get(port, "/nowhere").status == 404  # this does not call Redis

    try:
        eventually(serves, every=0.02, broken="the service serves")
        yield service
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@pytest.fixture
def start(tmp_path):
    """A function that starts a service for this test, and returns it."""
    with contextlib.ExitStack() as services:
        yield lambda *command, **settings: services.enter_context(
            running(tmp_path / "log", *command, **settings)
        )


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service that many tests share."""
    log = tmp_path_factory.mktemp("service") / "log"
    with running(log, BUILD_VERSION="0a1b2c3") as started:
        yield started


# Start and log


def test_log_has_one_line_for_start(service):
    get(service.port)
    get(service.port, "/health")
    lines = service.lines()
    assert len(lines) == 1, f"the log must have one line, not one for each request: {lines}"
    start = f"lab25-web starts on 127.0.0.1 port {service.port}"
    assert start in lines[0], f"the log must have {start!r}, got {lines[0]!r}"


def test_access_log_cannot_be_forged(start):
    service = start(ACCESS_LOG="1", HOST="localhost")
    get(service.port, "/nope%0aforged?q=1")
    line = eventually(lambda: service.lines("forged"), broken="a request is logged")[0]
    assert "GET" in line and r"/nope\nforged" in line and "404" in line, line


# Workers and Redis


def test_waiting_hits_delay_no_other_request(start):
    """Seven of a worker's eight threads wait for Redis, which then hangs up on all of them."""
    waiting, hang_up = threading.Semaphore(0), threading.Event()

    def reply(_):
        waiting.release()
        hang_up.wait(20)

    with peer(reply) as redis_port, concurrent.futures.ThreadPoolExecutor(7) as pool:
        service = start(REDIS_URL=patient_url(redis_port))
        hits = [pool.submit(get, service.port, timeout=30) for _ in range(7)]
        reached = [waiting.acquire(timeout=10) for _ in hits]
        assert all(reached), f"only {sum(reached)} of 7 hits wait at the same time"
        assert get(service.port, "/nowhere").status == 404
        hang_up.set()
        numbers = {one.result().json["hit_count"] for one in hits}
        assert numbers == {None}, f"hits without a reply must have no number, got {numbers}"
    assert len(service.lines(FAILED)) == 1, f"one outage must be logged once: {service.lines()}"


def test_each_worker_logs_outage_and_return_once(start):
    redis_port = free_port()
    service = start(WEB_CONCURRENCY="2", REDIS_URL=patient_url(redis_port))

    def hit_until_both_log(words):
        # Each hit has a new connection: kept ones may all lead to the same worker.
        eventually(
            lambda: get(service.port) and len(service.lines(words)) == 2,
            broken=f"each worker logs {words!r}",
        )

    hit_until_both_log(FAILED)
    with peer(lambda _: b":1\r\n", redis_port):
        hit_until_both_log(BACK)
        for _ in range(20):
            counted(get(service.port))
        logged = service.lines()[1:]
    assert "Connection refused" in logged[0]
    assert len(logged) == 4, f"an outage and its end must be two lines of each worker: {logged}"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_killed_worker_is_replaced_and_uptime_continues(start):
    service = start(changed_by("app.start_time -= 100"))
    killed = service.workers()[-1]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: service.workers() not in ([killed], []), broken="a new worker starts")
    health = eventually(lambda: get(service.port, "/health"), broken="the new worker serves")
    uptime = health.json["uptime_seconds"]
    assert uptime >= 100, f"a new worker must continue the uptime of the service, got {uptime} s"


# Bad requests and connections


BAD_REQUESTS = [
    b"nonsense\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 5_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + b"a" * 99_999,
]


def test_bad_requests_get_short_answers_and_no_log(service):
    for request in BAD_REQUESTS:
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
            try:
                connection.sendall(request)
                answer = connection.recv(4096)
            except ConnectionError:
                answer = b""
        status = answer.partition(b" ")[2][:3]
        assert status < b"500", f"{request[:40]} must not get a {status}: {answer}"
        assert len(answer) < 999, f"{request[:40]} gets a long answer: {answer}"
    assert get(service.port, "/health").status == 200
    assert len(service.lines()) == 1, f"a bad request is logged: {service.lines()}"


def test_idle_connection_is_kept_then_closed(start):
    settings = "granian.http.HTTP1Settings(**given | {'header_read_timeout': 500})"
    service = start(changed_by(f"serve.HTTP1Settings = lambda **given: {settings}"))
    kept = http.client.HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(kept):
        started = time.monotonic()
        assert eventually(lambda: ask(kept)).status == 200
        assert kept.sock, "a connection must be kept after its answer, and is closed"
        assert kept.sock.recv(1) == b"", "an idle connection must be closed"
        seconds = time.monotonic() - started
    assert seconds > 0.4, f"an idle connection is closed after {seconds:.1f} s instead of 0.5"


# Stop


def test_sigterm_finishes_requests_and_stops_with_0(start):
    """The parent receives it, as from `docker stop`."""
    requested = threading.Event()

    def reply_late(_):
        requested.set()
        time.sleep(0.3)
        return b":7\r\n"

    with peer(reply_late) as redis_port, concurrent.futures.ThreadPoolExecutor() as pool:
        service = start(REDIS_URL=patient_url(redis_port))
        answer = pool.submit(get, service.port)
        assert requested.wait(10)
        service.process.terminate()
        status = service.process.wait(PATIENCE_SECONDS)
        assert status == 0, f"after SIGTERM the exit status must be 0, got {status}"
        assert counted(answer.result()) == 7
    assert len(service.lines()) == 1, f"more than the start was logged: {service.lines()}"
    with pytest.raises(FAILURES):
        get(service.port)


def test_sigterm_stops_startup_that_waits_for_fifo(tmp_path):
    fifo = tmp_path / "password"
    os.mkfifo(fifo)
    environment = {**os.environ, "REDIS_HOST": "redis", "REDIS_PASSWORD_FILE": str(fifo)}
    with subprocess.Popen(COMMAND, env=environment) as process:
        try:
            # A writer can open it only when the service waits for the password.
            writer = eventually(lambda: os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            process.terminate()
            assert process.wait(5) == -signal.SIGTERM
        finally:
            process.kill()
    os.close(writer)
