"""`python app.py` as it is started without Docker: its settings, its log, its workers and its end."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import fakeredis
import pytest

from clients import eventually, get

APP = pathlib.Path(__file__).parents[1] / "app" / "app.py"


@pytest.fixture
def start(unused_port, tmp_path):
    """A function that starts the app, waits until it serves, and returns its process, with its `log`, and port."""
    started = []

    def run(**settings):
        port = int(settings.setdefault("PORT", str(unused_port)))
        log = tmp_path / f"{len(started)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, APP],
                env={**os.environ, **settings},
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.log = log
        started.append(process)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return process, port
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)

    yield run
    for process in started:
        process.terminate()
        process.wait(10)


@pytest.fixture
def redis_port(monkeypatch):
    """The port of a Redis made by fakeredis that real clients can connect to."""
    monkeypatch.setattr(fakeredis.TcpFakeServer, "request_queue_size", 64)  # 5 would drop connections made at once
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def refused(**settings):
    """Return the one line with which the app refuses to start."""
    result = subprocess.run(
        [sys.executable, APP], env={**os.environ, **settings}, capture_output=True, text=True, timeout=10
    )
    assert result.returncode not in (0, None)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_two_hundred_requests_from_many_threads_get_different_numbers(start, redis_port):
    _, port = start(REDIS_HOST="127.0.0.1", REDIS_PORT=str(redis_port))
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: get(port), range(200)))
    assert {answer.status for answer in answers} == {200}
    assert {answer.json["redis_error"] for answer in answers} == {None}
    assert sorted(answer.json["hit_count"] for answer in answers) == list(range(1, 201))


@pytest.mark.parametrize(
    "name, values, allowed",
    [
        ("PORT", ["0", "65536", "http", "-1", "80.0", " 80", "8_0", "²"], "from 1 to 65535"),
        ("REDIS_PORT", ["0", "65536", "redis"], "from 1 to 65535"),
        ("REDIS_DB", ["-1", "one", "9" * 5000], "from 0"),
        ("WEB_CONCURRENCY", ["0", "65", "auto"], "from 1 to 64"),
        ("ACCESS_LOG", ["2", "yes"], "from 0 to 1"),
        (
            "REDIS_HOST",
            ["redis:6379", "a..b", "x" * 64, "fe80:", "redis://redis:6379", "127.0.0.1:6379", "two words"],
            "host name",
        ),
        ("HOST", ["\udcff", "999.1.1.1", "192.0.2.1", "a..b"], "address"),
    ],
)
def test_a_bad_value_stops_the_start_with_one_line(app, monkeypatch, name, values, allowed):
    monkeypatch.setattr("granian.Granian", lambda *_, **__: pytest.fail("it started"))
    for value in values[1:]:
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stopped:
            app.main()
        message = stopped.value.code
        assert f"{name} is {value!r}" in message and allowed in message and "\n" not in message
    monkeypatch.delenv(name)
    line = refused(**{name: values[0]})
    assert f"{name} is {values[0]!r}" in line and allowed in line


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_a_port_that_is_taken_stops_the_start_with_one_line(start, host):
    _, port = start()
    assert f"PORT is {port}" in refused(PORT=str(port), HOST=host)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", ""])
def test_listens_on_a_name_or_an_address(start, host):
    _, port = start(HOST=host)
    assert get(port).status == 200


def test_the_log_says_what_was_started_and_nothing_per_request(start):
    process, port = start(REDIS_HOST="redis.invalid", WEB_CONCURRENCY="1", BUILD_VERSION="0a1b2c3")
    (line,) = process.log.read_text().splitlines()
    for part in ("0a1b2c3", str(port), "workers: 1", "redis.invalid:6379/0"):
        assert part in line
    get(port, "/health")
    lines = process.log.read_text().splitlines()
    assert len(lines) == 2 and "redis.invalid" in lines[1], "the start, then that Redis is away"


def test_access_log_is_a_line_per_request_that_a_client_cannot_forge(start):
    process, port = start(ACCESS_LOG="1")
    get(port, "/nope%0aforged?q=1")
    line = eventually(lambda: process.log.read_text().splitlines()[1:], 2)[-1]
    assert "GET" in line and r"/nope\nforged" in line and "404" in line


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_uptime_is_of_the_service_and_goes_on_when_a_worker_is_replaced(start):
    process, port = start(WEB_CONCURRENCY="1")
    time.sleep(1)
    before = get(port, "/health").json["uptime_seconds"]
    assert before >= 1
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)  # from Python 3.14 on the first is multiprocessing's resource tracker
    assert eventually(lambda: get(port, "/health"), 5).json["uptime_seconds"] >= before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_at_once_with_status_0(start, number):
    """Sent to the whole process group, as a terminal does at Ctrl-C or when it is closed."""
    process, port = start(WEB_CONCURRENCY="4")
    eventually(lambda: get(port, "/health"), 5)
    time.sleep(1)  # until every worker listens
    began = time.monotonic()
    os.killpg(process.pid, number)
    assert process.wait(10) == 0
    assert time.monotonic() - began < 1, process.log.read_text()
    assert len(process.log.read_text().splitlines()) == 1
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()


def test_goes_on_after_the_terminal_is_closed_when_nohup_started_it(start):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a new process inherits, as from nohup
    try:
        process, port = start()
    finally:
        signal.signal(signal.SIGHUP, before)
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert get(port).status == 200 and process.poll() is None


def test_a_request_in_flight_is_answered_before_the_end(start):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process, port = start(REDIS_HOST="127.0.0.1", REDIS_PORT=str(silent.getsockname()[1]))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(get, port)
            with silent.accept()[0]:  # the app has asked, and waits
                process.terminate()
                assert answer.result().status == 200
    assert process.wait(5) == 0


def test_importing_the_module_checks_nothing(monkeypatch):
    result = subprocess.run(
        [sys.executable, "-c", "import app; print(app.app.name)"],
        env={**os.environ, "PORT": "http", "REDIS_PORT": "nonsense", "WEB_CONCURRENCY": "0"},
        cwd=APP.parent,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "app\n", "")
