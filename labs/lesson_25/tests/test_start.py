"""`python app.py` as it is started without Docker: its settings, its log, its workers and its end."""

import concurrent.futures
import importlib
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import fakeredis
import pytest

from harness.clients import eventually, get, serving
from harness.engine import free_port
from harness.limits import STOP_SECONDS

APP = pathlib.Path(__file__).parents[1] / "app" / "app.py"
COMMAND = [sys.executable, APP]


@pytest.fixture
def start(tmp_path):
    """A function that starts the app, waits until it serves, and returns its process, with its `log`, and port."""
    started = []

    def run(**settings):
        port = int(settings.setdefault("PORT", str(free_port())))
        log = tmp_path / f"{len(started)}.log"
        options = {"env": {**os.environ, **settings}, "cwd": tmp_path, "start_new_session": True}
        with log.open("w") as output:
            process = subprocess.Popen(COMMAND, stdout=output, stderr=output, **options)
        process.log = log
        started.append(process)

        def connects():
            assert process.poll() is None, log.read_text()
            return not socket.create_connection(("127.0.0.1", port), timeout=1).close()

        eventually(connects, every=0.02)
        return process, port

    yield run
    for process in started:
        process.terminate()
        process.wait(10)


def refused(**settings):
    """Return the one line with which the app refuses to start."""
    environment = {**os.environ, **settings}
    result = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, timeout=10)
    (line,) = (result.stdout + result.stderr).splitlines()
    assert result.returncode != 0
    return line


def test_two_hundred_requests_from_many_threads_get_different_numbers(start, monkeypatch):
    monkeypatch.setattr(
        fakeredis.TcpFakeServer, "request_queue_size", 64
    )  # 5 would drop connections made at once
    with serving(fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")) as redis_port:
        _, port = start(REDIS_HOST="127.0.0.1", REDIS_PORT=str(redis_port))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: get(port), range(200)))
    assert {(answer.status, answer.json["redis_error"]) for answer in answers} == {(200, None)}
    assert sorted(answer.json["hit_count"] for answer in answers) == list(range(1, 201))


@pytest.fixture
def serve():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    module = importlib.import_module("serve")  # sets signal handlers, which are not for pytest
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return module


@pytest.fixture
def refusal(serve, monkeypatch):
    """A function that returns the one line with which the app, in this process, refuses to start."""
    monkeypatch.setattr(serve, "Server", lambda *_, **__: pytest.fail("it started"))

    def run(**settings):
        with monkeypatch.context() as only, pytest.raises(SystemExit) as stopped:
            for name, value in settings.items():
                only.setenv(name, value)
            serve.main()
        (line,) = stopped.value.code.splitlines()
        return line

    return run


@pytest.mark.parametrize(("name", "value"), [("PORT", "http"), ("HOST", "\udcff")])
def test_a_bad_value_ends_the_process_with_one_line(name, value):
    assert refused(**{name: value}).startswith(f"{name} is {value!r}")


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
            ["redis:6379", "a..b", "x" * 64, "fe80:", "redis://redis:6379", "two words"],
            "host name",
        ),
        (
            "REDIS_URL",
            ["redis", "http://r", "redis://", "redis://r:0", "redis://r:99999", "redis://r/one"],
            "redis://",
        ),
        ("REDIS_PASSWORD_FILE", ["/nowhere", "/", "/dev/null"], "a file with the password"),
        ("HOST", ["999.1.1.1", "192.0.2.1", "a..b"], "address"),
    ],
)
def test_a_bad_value_stops_the_start_and_is_named(app, refusal, name, values, allowed):
    for value in values:
        line = refusal(**{name: value})
        assert f"{name} is {value!r}" in line and allowed in line


@pytest.mark.parametrize(
    "settings",
    [
        {"REDIS_HOST": "redis", "REDIS_URL": "redis://:secret@redis"},
        {
            "REDIS_HOST": "redis",
            "REDIS_PASSWORD": "secret",
            "REDIS_PASSWORD_FILE": "/run/secrets/one",
        },
        {"REDIS_URL": "redis://:secret@redis", "REDIS_PASSWORD": "secret too"},
        {"REDIS_URL": "redis://:sec/ret@redis:6379"},
        {"REDIS_URL": "redis://:sec#ret@redis:6379"},
        {"REDIS_URL": "redis://:secret@redis:6379:1"},
        {"REDIS_URL": "redis://redis?password=secret&db=one"},
        {"REDIS_URL": "redis://redis?password=sec@ret", "REDIS_PASSWORD": "other"},
        {"REDIS_URL": "redis://:secret/0"},
        {"REDIS_URL": "redis://:secret@redis?socket_timeout=9"},
        {"REDIS_URL": "rediss://:secret@redis?ssl_nonsense=1"},
        {"REDIS_HOST": "redis://:se@cret@redis:6379"},
        {"REDIS_HOST": ":secret@redis"},
    ],
    ids=str,
)
def test_what_cannot_be_stops_the_start_and_shows_no_password(app, refusal, settings):
    line = refusal(**settings)
    assert "REDIS_" in line and "sec" not in line.replace("/run/secrets/one", "")


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_a_port_that_is_taken_stops_the_start_with_one_line(start, host):
    _, port = start()
    assert f"PORT is {port}" in refused(PORT=str(port), HOST=host)


def test_the_log_says_what_was_started_and_nothing_per_request(start):
    process, port = start(REDIS_HOST="redis.invalid", WEB_CONCURRENCY="1", BUILD_VERSION="0a1b2c3")
    (line,) = process.log.read_text().splitlines()
    for part in ("0a1b2c3", f"http://127.0.0.1:{port}", "workers: 1", "redis.invalid:6379/0"):
        assert part in line
    get(port, "/health")
    lines = process.log.read_text().splitlines()
    assert len(lines) == 2 and "redis.invalid" in lines[1], "the start, then that Redis is away"


def test_access_log_is_a_line_per_request_that_a_client_cannot_forge(start):
    process, port = start(ACCESS_LOG="1")
    get(port, "/nope%0aforged?q=1")
    line = eventually(lambda: process.log.read_text().splitlines()[1:])[-1]
    assert "GET" in line and r"/nope\nforged" in line and "404" in line


def processes(parent):
    """Return the numbers of a process and of its children, which come first."""
    children = pathlib.Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    return [*map(int, children), parent.pid]


def signal_group(process, number):
    """As a terminal does at Ctrl-C."""
    os.killpg(process.pid, number)


def signal_each(process, number):
    """As systemd does: one by one, the workers before their parent has heard it."""
    for pid in processes(process):
        os.kill(pid, number)
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [signal_group, signal_each, subprocess.Popen.send_signal])
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_signal_ends_it_with_status_0(start, send, number):
    process, port = start(WEB_CONCURRENCY="4")
    send(process, number)
    assert process.wait(10) == 0, process.log.read_text()
    assert len(process.log.read_text().splitlines()) == 1
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()


@pytest.mark.slow
@pytest.mark.timing
def test_a_signal_to_all_its_processes_ends_it_at_once_also_on_a_busy_machine(start):
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())
    ]
    try:
        for turn in range(40):
            process, _ = start(WEB_CONCURRENCY="4")
            time.sleep(0.5)
            began = time.monotonic()
            (signal_group if turn % 2 else signal_each)(process, signal.SIGTERM)
            assert process.wait(10) == 0, process.log.read_text()
            assert time.monotonic() - began < STOP_SECONDS
    finally:
        for one in busy:
            one.kill()
            one.wait()


def test_a_signal_while_it_is_still_starting_ends_it():
    """Before Python has a handler the signal's own action ends it; process 1 of a container has none."""

    def status(seconds):
        process = subprocess.Popen(COMMAND, env={**os.environ, "PORT": str(free_port())})
        time.sleep(seconds)
        process.terminate()
        return process.wait(4)  # after five seconds the workers are killed

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(status, [hundredths / 100 for hundredths in range(5, 100, 5)]))
    assert set(statuses) <= {0, -signal.SIGTERM}


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_no_worker_outlives_a_killed_parent(start):
    process, _ = start()
    workers = processes(process)[:-1]
    process.kill()
    process.wait()
    eventually(lambda: not any(pathlib.Path(f"/proc/{worker}/cwd").exists() for worker in workers))


@pytest.mark.parametrize(
    ("inherited", "ends"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)], ids=["", "nohup"]
)
def test_goes_on_after_the_terminal_is_closed_only_when_nohup_started_it(start, inherited, ends):
    before = signal.signal(signal.SIGHUP, inherited)
    try:
        process, port = start()
    finally:
        signal.signal(signal.SIGHUP, before)
    signal_group(process, signal.SIGHUP)
    if ends:
        assert process.wait(5) == -signal.SIGHUP
    else:
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


def test_an_answer_given_while_it_ends_closes_its_connection(serve, app, client, monkeypatch):
    """Or a client that keeps asking would keep one that was accepted at the last moment, and delay the end."""
    monkeypatch.setattr(app.app, "after_request_funcs", {})
    monkeypatch.setattr(signal, "getsignal", lambda _: lambda *_: None)
    assert "Connection" not in client.get("/health").headers
    serve.end_with(multiprocessing.Pipe(duplex=False)[0], None)
    assert client.get("/health").headers["Connection"] == "close"


def test_importing_the_module_checks_nothing():
    environment = {**os.environ, "PORT": "http", "REDIS_PORT": "nonsense", "WEB_CONCURRENCY": "0"}
    command = [sys.executable, "-c", "import app; print(app.app.name)"]
    assert subprocess.check_output(command, env=environment, cwd=APP.parent, text=True) == "app\n"
