"""`python serve.py` as it is started without Docker: its log, its workers and its end."""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import ending
import serve
from harness.clients import Visitors, counted, eventually, get, serving
from harness.engine import CONTEXT, free_port
from harness.limits import STOP_SECONDS
from harness.peers import FakeRedisServer, counting_by, peer

COMMAND = [sys.executable, CONTEXT / "serve.py"]
FAILED = "Redis failed, hits are not counted: "
BACK = "Redis is back, hits are counted again"

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")


def changed_by(statement):
    """Return a command that starts the service after a statement has changed it.

    Where Python does not fork, the change reaches no worker.
    """
    program = f"""
import sys
sys.path.insert(0, {str(CONTEXT)!r})
import ending
ending.block_end_signals()
import app, serve, watch
{statement}
serve.main()
"""
    return [sys.executable, "-c", program]


# Its watch asks and tells more often than by its own times, so that a test need not wait for those.
# And it waits longer for an answer: on a busy machine, a stand-in for Redis may be slow.
WITH_A_QUICK_WATCH = changed_by(
    "watch.PAUSE_SECONDS, watch.QUIET_SECONDS, app.WAIT_SECONDS = 0.05, 0.3, 20"
)


class Service:
    """The running service: its `process`, its `port`, and its `log`."""

    def __init__(self, process, port, log):
        self.process = process
        self.port = port
        self._log = log

    @property
    def log(self):
        return self._log.read_text()

    def lines(self, words=""):
        """Return the lines of the log with these words."""
        return [line for line in self.log.splitlines() if words in line]

    def workers(self):
        """Return the process IDs of the workers."""
        pid = self.process.pid
        return list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def ends_with(self, status, seconds=10):
        """Fail unless the service ends by itself, with this exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        ended = self.process.returncode
        assert ended is not None, f"the service goes on after {seconds} s; its log:\n{self.log}"
        assert ended == status, f"exit status {ended}, not {status}; its log:\n{self.log}"


@pytest.fixture
def start(tmp_path):
    """A function that starts the service, waits until it serves, and returns it."""
    with contextlib.ExitStack() as started:

        def run(command=COMMAND, address="127.0.0.1", **settings):
            port = int(settings.setdefault("PORT", str(free_port())))
            log = tmp_path / f"{port}.log"
            with log.open("w") as output:
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **settings},
                    cwd=tmp_path,
                    start_new_session=True,
                )
            started.callback(process.wait, 10)
            started.callback(process.terminate)
            service = Service(process, port, log)

            def connects():
                assert process.poll() is None, f"the service has ended: {service.log}"
                return not socket.create_connection((address, port), timeout=1).close()

            eventually(connects, every=0.02, broken=f"nothing listens on {address}")
            return service

        yield run


# Where it listens, and what it says when it starts


@pytest.mark.parametrize(
    ("host", "address"), [("", "127.0.0.1"), ("localhost", "localhost"), ("::", "::1")]
)
def test_listens_where_host_says(start, host, address):
    service = start(HOST=host, address=address)
    if host != "::":
        with pytest.raises(OSError):  # only this machine reaches it
            socket.create_connection(("127.0.0.2", service.port), timeout=5).close()


def test_a_bad_value_ends_the_process_with_one_line():
    result = subprocess.run(
        COMMAND, env={**os.environ, "PORT": "http"}, capture_output=True, text=True, timeout=20
    )
    assert result.returncode != 0
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line == "PORT is 'http': it must be a whole number from 1 to 65535 (default 8080)"


def test_the_log_says_what_was_started_and_nothing_per_request(start):
    service = start(WEB_CONCURRENCY="1", BUILD_VERSION="0a1b2c3")
    get(service.port, "/")
    get(service.port, "/health")
    (line,) = service.lines()
    said = f"lab25-web 0a1b2c3 on http://127.0.0.1:{service.port}, workers: 1, Redis: none"
    assert said in line


def test_access_log_is_a_line_per_request_that_a_client_cannot_forge(start):
    service = start(ACCESS_LOG="1")
    get(service.port, "/nope%0aforged?q=1")
    line = eventually(lambda: service.lines()[1:])[-1]
    assert "GET" in line and r"/nope\nforged" in line and "404" in line


def test_the_development_server_needs_no_other_file(start, tmp_path):
    """`python app.py`, as in the plain recipe: Flask's own server."""
    alone = tmp_path / "app.py"
    alone.write_bytes((CONTEXT / "app.py").read_bytes())
    service = start([sys.executable, alone])
    assert get(service.port).json["message"] == "Hello from lab25"
    assert "development server" in service.log


# Counting, and Redis going and coming back


def test_two_hundred_requests_from_many_threads_get_different_numbers(start):
    with serving(FakeRedisServer()) as redis_port:
        service = start(REDIS_HOST="127.0.0.1", REDIS_PORT=str(redis_port))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: get(service.port), range(200)))
    assert {(answer.status, answer.json["redis_error"]) for answer in answers} == {(200, None)}
    assert sorted(answer.json["hit_count"] for answer in answers) == list(range(1, 201))


def test_eight_first_hits_at_once_tell_one_outage_once(start):
    eight_ask, is_over = threading.Barrier(8, timeout=10), threading.Event()

    def hang_up_on_the_first_eight():
        if is_over.is_set():
            return b":7\r\n"
        eight_ask.wait()
        is_over.set()
        return None

    with peer(counting_by(hang_up_on_the_first_eight)) as redis_port:
        settings = {"REDIS_PORT": str(redis_port), "WEB_CONCURRENCY": "1"}
        service = start(WITH_A_QUICK_WATCH, REDIS_HOST="127.0.0.1", **settings)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: get(service.port), range(8)))
        assert not eight_ask.broken, "a worker does not ask Redis for eight hits at once"
        assert {answer.json["hit_count"] for answer in answers} == {None}
        eventually(lambda: service.lines(BACK), broken="the log does not tell that Redis is back")
    assert len(service.lines(FAILED)) == 1, f"one outage is told several times:\n{service.log}"


def test_each_worker_says_once_that_redis_went_and_once_that_hits_count_again(start):
    redis_port = free_port()
    service = start(WITH_A_QUICK_WATCH, REDIS_HOST="127.0.0.1", REDIS_PORT=str(redis_port))
    eventually(
        lambda: len(service.lines(FAILED)) == 2, broken="not every worker tells that Redis failed"
    )
    with serving(FakeRedisServer(redis_port)):
        eventually(
            lambda: len(service.lines(BACK)) == 2,
            broken="not every worker tells that Redis is back",
        )
        assert all(counted(get(service.port)) for _ in range(10))
    assert len(service.lines(FAILED)) == 2, f"one outage is told several times:\n{service.log}"


def test_says_that_redis_is_away_though_nobody_asks(start):
    service = start(WITH_A_QUICK_WATCH, REDIS_HOST="127.0.0.1", REDIS_PORT=str(free_port()))
    line = eventually(
        lambda: service.lines(FAILED), broken="the log does not tell that Redis is away"
    )[0]
    assert "Connection refused" in line, f"the log does not say why Redis is away: {line}"


def test_a_redis_that_hangs_up_in_the_middle_makes_no_error(start):
    with peer(lambda said: None) as redis_port:
        service = start(WITH_A_QUICK_WATCH, REDIS_HOST="127.0.0.1", REDIS_PORT=str(redis_port))
        with Visitors(service.port, count=8) as visitors:
            eventually(lambda: service.lines(FAILED))
        visitors.numbers()


# Its workers


@needs_proc
def test_a_killed_worker_is_replaced_and_the_uptime_goes_on(start):
    service = start(changed_by("app.start_time -= 100"), WEB_CONCURRENCY="1")
    (first,) = service.workers()
    os.kill(first, signal.SIGKILL)
    eventually(
        lambda: service.workers() not in ([], [first]), broken="a worker that died is not replaced"
    )
    uptime = eventually(lambda: get(service.port, "/health")).json["uptime_seconds"]
    assert uptime >= 100, f"the uptime begins anew with a new worker: {uptime} s"


@needs_proc
def test_no_worker_outlives_a_killed_parent(start):
    service = start()
    workers = service.workers()
    service.process.kill()
    service.process.wait()

    def all_ended():
        return not any(pathlib.Path(f"/proc/{worker}/cwd").exists() for worker in workers)

    eventually(all_ended)


# Its end


def signal_group(service, number):
    """As a terminal does at Ctrl-C."""
    os.killpg(service.process.pid, number)


def signal_each(service, number):
    """As systemd does: one by one, the workers before their parent has heard it."""
    for pid in [*service.workers(), service.process.pid]:
        os.kill(pid, number)
        time.sleep(0.002)


def signal_parent(service, number):
    """As `docker stop` does."""
    service.process.send_signal(number)


@pytest.mark.parametrize("send", [signal_group, signal_each, signal_parent])
@needs_proc
def test_a_signal_ends_it_with_status_0(start, send):
    """SIGTERM ends one service and SIGINT another; both start at the same time."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        services = list(pool.map(lambda _: start(WEB_CONCURRENCY="4"), numbers))
    for service, number in zip(services, numbers, strict=True):
        send(service, number)
        service.ends_with(0, seconds=2.9)  # a second, and patience for a busy machine
        log = service.log
        assert len(service.lines()) == 1, f"after {number.name} it said more than its start:\n{log}"
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", service.port), timeout=1).close()


# Serves with an event whose lock the main thread holds at the moment of the signal: granian's own
# handler, run in that thread, would wait for that lock for ever.
SIGNALLED_WITH_THE_LOCK = f"""
import multiprocessing, os, signal, sys, threading, time
sys.path.insert(0, {str(CONTEXT)!r})
import ending, serve

multiprocessing.set_start_method(sys.argv[1])
ending.block_end_signals()

class Event(threading.Event):
    def wait(self, timeout=None):
        with self._cond:
            if not self._flag:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
        return super().wait(timeout)

class Server(serve.Server):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.main_loop_interrupt = Event()

serve.Server = Server
serve.main()
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_signal_is_acted_on_also_while_the_server_holds_the_lock_of_its_event(start_method):
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED_WITH_THE_LOCK, start_method],
        env={**os.environ, "PORT": str(free_port())},
    )
    try:
        assert process.wait(20) == 0
    except subprocess.TimeoutExpired:
        pytest.fail("SIGTERM was never acted on: its handler waits for a lock")
    finally:
        process.kill()
        process.wait()


# The service, where the parent is so slow that all workers end before it asks granian to end them.
SLOW_TO_END_THEM = f"""
import sys, time
sys.path.insert(0, {str(CONTEXT)!r})
import ending, serve

ending.block_end_signals()

class Server(serve.Server):
    def _stop_workers(self):
        time.sleep(0.5)
        super()._stop_workers()

serve.Server = Server
serve.main()
"""


def test_a_worker_that_ends_before_the_parent_asks_for_it_is_no_crash(start):
    service = start([sys.executable, "-c", SLOW_TO_END_THEM])
    service.process.terminate()
    service.ends_with(0)
    assert len(service.lines()) == 1, f"it said more than its start:\n{service.log}"


@pytest.mark.slow
@pytest.mark.timing
@needs_proc
def test_a_signal_to_all_its_processes_ends_it_at_once_also_on_a_busy_machine(start):
    busy_command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(busy_command) for _ in range(os.cpu_count())]
    try:
        for turn in range(40):
            service = start(WEB_CONCURRENCY="4")
            send = signal_group if turn % 2 else signal_each
            time.sleep(0.5)
            began = time.monotonic()
            send(service, signal.SIGTERM)
            service.ends_with(0)
            assert time.monotonic() - began < STOP_SECONDS
    finally:
        for process in busy:
            process.kill()
            process.wait()


# Without the limit after which a worker that has not heard its end is killed. With the limit, such
# a worker could not be told from a slow machine.
NEVER_KILLING = changed_by("serve.KILL_SECONDS = 3600")


def test_a_signal_while_it_is_still_starting_ends_it():
    """At every moment: before the first line has run, the signal's own action ends it.

    All start side by side, and so slowly that the moments are spread over the whole start.
    """
    moments = [tenths / 10 + 0.05 for tenths in range(10)]

    def status(seconds):
        process = subprocess.Popen(NEVER_KILLING, env={**os.environ, "PORT": str(free_port())})
        try:
            time.sleep(seconds)
            process.terminate()
            return process.wait(30)
        except subprocess.TimeoutExpired:
            return f"did not end, signalled {seconds} s after its start"
        finally:
            process.kill()
            process.wait()

    with concurrent.futures.ThreadPoolExecutor(len(moments)) as pool:
        statuses = set(pool.map(status, moments))
    assert statuses <= {0, -signal.SIGTERM}, f"a signal was lost: {statuses}"


@contextlib.contextmanager
def inheriting(handler):
    """Let what is started in a `with` block inherit this handler of SIGHUP."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_ends_it_unless_nohup_started_it(start):
    with inheriting(signal.SIG_IGN):  # as nohup sets it
        kept = start()
    signal_group(kept, signal.SIGHUP)
    with inheriting(signal.SIG_DFL):
        other = start()
    signal_group(other, signal.SIGHUP)
    other.ends_with(0)
    assert kept.process.poll() is None, "nohup did not keep it alive"
    assert get(kept.port).status == 200


def test_a_request_in_flight_is_answered_before_the_end(start):
    asked = threading.Event()

    def answer_late():
        asked.set()
        time.sleep(0.3)
        return b":7\r\n"

    with peer(counting_by(answer_late)) as redis_port:
        service = start(REDIS_HOST="127.0.0.1", REDIS_PORT=str(redis_port))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(get, service.port)
            assert asked.wait(10)
            service.process.terminate()
            assert counted(answer.result()) == 7
        service.ends_with(0)


def test_an_answer_given_while_it_ends_closes_its_connection_and_keeps_a_copiers_hooks(
    app, client, monkeypatch
):
    """Or a client that keeps asking would keep a connection that was accepted just now."""
    hooks = {None: [add_a_header]}
    monkeypatch.setattr(app.app, "after_request_funcs", hooks)
    monkeypatch.setattr(app.app, "_got_first_request", False)
    monkeypatch.setattr(ending, "block_end_signals", lambda: None)
    monkeypatch.setattr(ending, "is_ending", threading.Event())
    inherited = signal.getsignal(signal.SIGTERM)
    ended = threading.Event()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(signal.signal, signal.SIGTERM, inherited)
        workers_end, parents_end = serve.multiprocessing.Pipe(duplex=False)
        serve.load_app(app.start_time, workers_end, duplicate(parents_end))
        assert "Connection" not in client.get("/health").headers
        signal.signal(signal.SIGTERM, lambda *_: ended.set())  # as granian does
        parents_end.close()
        assert ended.wait(10), "the worker did not hear that its parent has ended"
    answer = client.get("/health")
    connection = answer.headers.get("Connection")
    assert connection == "close", f"an answer given at the end keeps its connection: {connection}"
    assert answer.headers["X-Copier"] == "kept"


def add_a_header(response):
    """What somebody who copied the app has registered with after_request."""
    response.headers["X-Copier"] = "kept"
    return response


def duplicate(connection):
    """Return a second end of a pipe, as a new process gets one."""
    return type(connection)(os.dup(connection.fileno()), readable=False)
