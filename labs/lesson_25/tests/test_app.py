"""The app's answers, with a Redis that is there, away, or wrong."""

import concurrent.futures
import contextlib
import itertools
import socket
import socketserver
import threading
import time

import fakeredis
import pytest
import redis

from harness.clients import eventually, serving
from harness.engine import free_port
from harness.limits import PATIENCE_SECONDS


@pytest.fixture
def peer(monkeypatch):
    """A function that starts the server behind REDIS_HOST; where `answer(connection, said)` is None, it hangs up."""
    with contextlib.ExitStack() as servers:

        def start(answer):
            def handle(connection, *_):
                while (said := connection.recv(4096)) and (
                    speech := answer(connection, said)
                ) is not None:
                    connection.sendall(speech)

            server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handle)
            monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
            monkeypatch.setenv("REDIS_PORT", str(servers.enter_context(serving(server))))

        yield start


def hit(client):
    """Return (hit_count, redis_error) of one GET /."""
    response = client.get("/")
    assert response.status_code == 200
    return response.json["hit_count"], response.json["redis_error"]


def counts_within(client, seconds=PATIENCE_SECONDS):
    """Return the first number handed out, within `seconds`."""
    return eventually(lambda: hit(client)[0], seconds)


# The answers, and counting


@pytest.mark.parametrize(
    ("settings", "env", "version", "build_date"),
    [
        ({}, "dev", "dev", "unknown"),
        ({"LAB_ENV": "", "BUILD_VERSION": "", "BUILD_DATE": ""}, "dev", "dev", "unknown"),
        (
            {"LAB_ENV": "prod", "BUILD_VERSION": "0a1b2c3", "BUILD_DATE": "2025-11-24"},
            "prod",
            "0a1b2c3",
            "2025-11-24",
        ),
    ],
)
def test_both_routes_answer_with_every_field(
    client, redis_server, monkeypatch, settings, env, version, build_date
):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    index = client.get("/", headers={"Host": "lab25.example:8080"})
    said = {"message": "Hello from lab25", "path": "/", "host": "lab25.example:8080", "env": env}
    assert index.json == {**said, "hit_count": 1, "redis_error": None}
    health = client.get("/health")
    answer = health.json
    assert isinstance(answer.pop("uptime_seconds"), int) and isinstance(answer.pop("hostname"), str)
    assert answer == {
        "status": "ok",
        "env": env,
        "redis_ok": True,
        "version": version,
        "build_date": build_date,
    }
    for response in (index, health):
        assert (response.status_code, response.content_type) == (200, "application/json")


def test_counts_once_per_request(client, redis_server):
    assert [hit(client) for _ in range(3)] == [(1, None), (2, None), (3, None)]
    assert fakeredis.FakeRedis(server=redis_server).get("lab25_hits") == b"3"


def test_counts_nothing_where_redis_is_not_configured(client, monkeypatch):
    assert hit(client) == (None, None)
    assert client.get("/health").json["redis_ok"] is False
    monkeypatch.setenv("REDIS_HOST", "")
    monkeypatch.setenv("REDIS_PORT", "nonsense")
    assert hit(client) == (None, None)


# The four seams


def test_follows_a_replaced_client_at_once_whatever_the_environment_says(
    app, client, redis_server, monkeypatch
):
    monkeypatch.setenv("REDIS_PORT", "nonsense")
    redis_server.connected = False
    assert hit(client)[0] is None
    monkeypatch.setattr(app, "_redis_client", fakeredis.FakeRedis())
    assert hit(client) == (1, None)
    monkeypatch.setattr(app, "get_redis_client", lambda: None)
    assert hit(client) == (None, None)
    monkeypatch.setattr(app, "get_redis_client", fakeredis.FakeRedis)
    assert hit(client)[1] is None


def test_follows_a_replaced_class_at_once_though_a_client_of_another_is_there(
    app, client, monkeypatch
):
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT", str(free_port()))
    assert "refused" in hit(client)[1].lower()
    fake = fakeredis.FakeRedis()
    monkeypatch.setattr(app.redis, "Redis", lambda **_: fake)
    assert hit(client) == (1, None)
    monkeypatch.setattr(app, "redis", None)
    assert hit(client)[0] is None and app.get_redis_client() is None


def test_serves_without_the_redis_package_and_says_so_where_redis_is_configured(
    app, client, monkeypatch
):
    monkeypatch.setattr(app, "redis", None)
    assert hit(client) == (None, None)
    for variable in ("REDIS_HOST", "REDIS_URL"):
        with monkeypatch.context() as only:
            only.setenv(variable, "redis.example")
            assert app.get_redis_client() is None
            number, error = hit(client)
            assert number is None and "package" in error


def test_a_bad_setting_without_the_check_at_the_start_is_no_crash(client, monkeypatch):
    monkeypatch.setenv("REDIS_HOST", "redis.example")
    monkeypatch.setenv("REDIS_PORT", "http")
    number, error = hit(client)
    assert number is None and "REDIS_PORT is 'http'" in error


# A Redis that is away, or wrong


def test_a_hit_is_the_first_word_to_redis_and_is_not_sent_again(app, client, monkeypatch):
    """No handshake: each of its steps could wait for a frozen Redis once more."""
    monkeypatch.setattr(app, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(app, "PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("REDIS_PORT", str(silent.getsockname()[1]))
        assert hit(client)[0] is None
        said = []
        for _ in range(3):
            with silent.accept()[0] as connection:
                said.append(connection.recv(4096).splitlines()[2])
    assert said == [b"INCRBY", b"PING", b"PING"]


def test_says_why_while_redis_is_away_and_counts_again_after(client, redis_server, caplog):
    assert hit(client) == (1, None)
    redis_server.connected = False
    for _ in range(3):
        number, error = hit(client)
        assert number is None and isinstance(error, str) and error
    assert client.get("/health").json["redis_ok"] is False
    redis_server.connected = True
    assert counts_within(client) == 2
    assert client.get("/health").json["redis_ok"] is True
    gone, back = [record.getMessage() for record in caplog.records]
    assert error in gone and "back" in back


def test_health_alone_notices_that_redis_is_back(client, redis_server, caplog):
    redis_server.connected = False
    assert client.get("/health").json["redis_ok"] is False
    redis_server.connected = True
    eventually(lambda: client.get("/health").json["redis_ok"])
    assert len(caplog.records) == 2


@pytest.mark.parametrize("path", ["/", "/health"])
@pytest.mark.parametrize("seam", ["_redis_client", "get_redis_client"])
def test_one_request_waits_for_a_frozen_redis_and_all_after_it_are_answered_at_once(
    app, client, monkeypatch, seam, path
):
    class Frozen(fakeredis.FakeRedis):
        def execute_command(self, *_, **__):
            askers.append(threading.current_thread())
            raise redis.TimeoutError("Timeout reading from socket")

    askers = []
    monkeypatch.setattr(app, seam, Frozen() if seam == "_redis_client" else lambda: Frozen())
    monkeypatch.setattr(app, "PAUSE_SECONDS", 0.01)
    client.get(path)
    for _ in range(20):  # through some pings of the outage
        assert client.get("/health").json["redis_ok"] is False
        assert hit(client) == (None, "Timeout reading from socket")
        time.sleep(0.01)
    assert askers.count(threading.current_thread()) == 1


def test_no_request_waits_for_a_log_that_is_blocked(app, client, redis_server, monkeypatch):
    blocked, unblocked = threading.Event(), threading.Event()
    monkeypatch.setattr(app.app.logger, "warning", lambda *_: blocked.set() or unblocked.wait(5))
    redis_server.connected = False
    teller = threading.Thread(target=hit, args=[app.app.test_client()])
    teller.start()
    assert blocked.wait(5)
    assert client.get("/health").status_code == 200
    assert hit(client)[0] is None
    assert teller.is_alive(), "they were answered only when the log went on"
    unblocked.set()
    teller.join()


def test_connections_to_where_redis_was_cost_no_second_outage(app, client, monkeypatch, peer):
    """Three hits at once leave three connections; the first to meet the silence ends an outage for all."""

    def answer(connection, said):
        if not moved.is_set():
            old.append(connection)
        elif connection in old:
            return b""
        if b"INCRBY" in said:
            together.wait(5)
        return b"+PONG\r\n" if b"PING" in said else b":1\r\n"

    def three_hits():
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda _: hit(app.app.test_client()), range(3)))

    old, moved, together = [], threading.Event(), threading.Barrier(3)
    monkeypatch.setattr(app, "WAIT_SECONDS", 0.5)
    peer(answer)
    assert client.get("/health").json[
        "redis_ok"
    ]  # makes the client, which three hits at once would do three times
    assert three_hits() == [(1, None)] * 3
    moved.set()
    assert hit(client)[0] is None
    eventually(lambda: client.get("/health").json["redis_ok"])
    assert three_hits() == [(1, None)] * 3


@pytest.mark.parametrize(
    "failure", [SystemExit, KeyboardInterrupt, redis.ConnectionError, ValueError]
)
def test_whatever_a_ping_raises_hits_are_counted_again(
    app, client, redis_server, monkeypatch, failure
):
    def ping():
        for one in failures:
            raise one
        return True

    failures = iter([failure])
    monkeypatch.setattr(app._redis_client, "ping", ping)
    monkeypatch.setattr(app, "PAUSE_SECONDS", 0.05)
    redis_server.connected = False
    assert hit(client)[0] is None
    redis_server.connected = True
    assert counts_within(client) == 1
    assert not list(failures)


def test_serves_where_no_thread_can_be_started(app, client, redis_server, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", start)
        assert hit(client) == (None, "can't start new thread")
    assert hit(client) == (1, None)


def test_a_late_failure_of_an_outage_that_is_over_makes_no_new_one(
    app, client, redis_server, monkeypatch, caplog
):
    def uneven(*arguments):
        seconds, answers = next(outcomes)
        time.sleep(seconds)
        if not answers:
            raise redis.ConnectionError("Connection refused")
        return count(*arguments)

    outcomes = iter(
        [(1.2, False), (0, False), (0, True), (0, True)]
    )  # seconds to an answer, and whether it is one
    count = app._redis_client.incr
    monkeypatch.setattr(app._redis_client, "incr", uneven)
    late = threading.Thread(target=hit, args=[app.app.test_client()])
    late.start()
    time.sleep(0.05)
    assert hit(client)[0] is None
    assert counts_within(client, 1) == 1
    late.join()
    assert hit(client) == (2, None)
    assert len(caplog.records) == 2


def test_a_late_success_from_before_an_outage_does_not_end_it(
    app, client, redis_server, monkeypatch, caplog
):
    def slow(*arguments):
        answer = count(*arguments)
        time.sleep(0.3)
        return answer

    count = app._redis_client.incr
    monkeypatch.setattr(app._redis_client, "incr", slow)
    late = threading.Thread(target=hit, args=[app.app.test_client()])
    late.start()
    time.sleep(0.1)
    redis_server.connected = False
    assert hit(client)[0] is None
    late.join()
    assert hit(client)[0] is None
    assert len(caplog.records) == 1


def test_the_log_says_that_hits_are_counted_again_only_when_they_are(
    app, client, redis_server, monkeypatch, caplog
):
    def stuck(*_):  # as in a CLIENT PAUSE WRITE: pings are answered, hits are not
        raise redis.TimeoutError("Timeout reading from socket")

    monkeypatch.setattr(app._redis_client, "incr", stuck)
    monkeypatch.setattr(app, "PAUSE_SECONDS", 0.05)
    for _ in range(3):
        assert hit(client)[0] is None
        time.sleep(0.2)
        assert client.get("/health").json["redis_ok"] is True
    assert len(caplog.records) == 1


def test_a_key_of_the_wrong_type_is_no_outage_and_the_log_says_it_beside_one(
    client, redis_server, caplog
):
    other = fakeredis.FakeRedis(server=redis_server)
    other.lpush("lab25_hits", "not a number")
    for _ in range(3):
        number, error = hit(client)
        assert number is None and "WRONGTYPE" in error
        assert client.get("/health").json["redis_ok"] is True
    redis_server.connected = False
    error = hit(client)[1]
    redis_server.connected = True
    other.delete("lab25_hits")
    assert counts_within(client) == 1
    first, second, third = [record.getMessage() for record in caplog.records]
    assert "WRONGTYPE" in first and error in second and "back" in third


def test_a_redis_that_fails_in_turns_does_not_fill_the_log(
    app, client, redis_server, monkeypatch, caplog
):
    def moody(*arguments):
        if next(calls) % 2:
            raise redis.exceptions.ReadOnlyError("You can't write against a read only replica.")
        return count(*arguments)

    calls, count = itertools.count(1), app._redis_client.incr
    monkeypatch.setattr(app._redis_client, "incr", moody)
    assert len([number for number, _ in (hit(client) for _ in range(200)) if number]) == 100
    assert 1 <= len(caplog.records) <= 3


@pytest.mark.parametrize("answer", [b"OK", "1", None, True, [1]])
def test_an_answer_that_is_no_number_is_no_count(app, client, redis_server, monkeypatch, answer):
    monkeypatch.setattr(app._redis_client, "incr", lambda *_: answer)
    number, error = hit(client)
    assert number is None and repr(answer) in error


@pytest.mark.parametrize(
    "speech",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"+OK\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"$-5\r\n",
        b"\xff\x00",
        None,
    ],
)
def test_a_peer_that_is_no_redis_is_no_count(client, peer, speech):
    peer(lambda *_: speech)
    number, error = hit(client)
    assert number is None and isinstance(error, str) and error
    answer = client.get("/health")
    assert (answer.status_code, answer.json["redis_ok"]) == (200, False)


@pytest.mark.parametrize(
    ("speech", "reason"),
    [
        (b"-MOVED 3035 172.19.0.4:6379\r\n", "MovedError: 3035 172.19.0.4:6379"),
        (
            b"-NOPERM this user has no permissions\r\n",
            "NoPermissionError: this user has no permissions",
        ),
        (b"-NOAUTH Authentication required.\r\n", "Authentication required."),
        (
            b"-ERR unknown command 'AUTH', with args beginning with: 'pass-word'\r\n",
            "unknown command 'AUTH'",
        ),
    ],
)
def test_an_error_that_redis_answers_is_named_and_shows_no_password(
    client, monkeypatch, peer, caplog, speech, reason
):
    peer(lambda *_: speech)
    if b"AUTH'" in speech:
        monkeypatch.setenv("REDIS_PASSWORD", "pass-word")
    number, error = hit(client)
    assert number is None and reason in error
    assert "pass-word" not in error + caplog.text


# Where Redis is


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"REDIS_HOST": "r", "REDIS_PASSWORD": "p"},
            {"host": "r", "port": 6379, "db": 0, "password": "p"},
        ),
        (
            {"REDIS_HOST": "::1", "REDIS_PORT": "1", "REDIS_DB": "2"},
            {"host": "::1", "port": 1, "db": 2},
        ),
        (
            {"REDIS_URL": "redis://r:1/2"},
            {"host": "r", "port": 1, "db": 2, "password": None, "ssl": False},
        ),
        (
            {"REDIS_URL": "redis://r", "REDIS_PORT": "tcp://10.0.0.1:6379"},
            {"host": "r", "port": 6379, "db": 0},
        ),
        (
            {"REDIS_URL": "redis://:a%2Fb%40c@[::1]:1"},
            {"host": "::1", "port": 1, "password": "a/b@c"},
        ),
        (
            {"REDIS_URL": "rediss://u:p@r?ssl_ca_certs=ca"},
            {"username": "u", "ssl": True, "ssl_ca_certs": "ca"},
        ),
        (
            {"REDIS_URL": "unix:///run/r.sock?db=1"},
            {"unix_socket_path": "/run/r.sock", "db": 1, "ssl": False},
        ),
        ({"REDIS_URL": "redis://u@r", "REDIS_PASSWORD": "p"}, {"username": "u", "password": "p"}),
    ],
)
def test_redis_is_where_the_variables_say(app, monkeypatch, settings, expected):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(
        app.redis, "Redis", lambda **options: calls.append(options) or fakeredis.FakeRedis()
    )
    assert app.get_redis_client() is app.get_redis_client()
    (options,) = calls
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize("content", ["pass word", "pass word\n", "pass word\r\n"])
def test_the_password_is_what_the_file_holds_without_its_line_end(
    app, monkeypatch, tmp_path, content
):
    (tmp_path / "password").write_bytes(content.encode())
    monkeypatch.setenv("REDIS_HOST", "redis.example")
    monkeypatch.setenv("REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    assert app.get_redis_client().connection_pool.connection_kwargs["password"] == "pass word"


# What HTTP asks for


@pytest.mark.parametrize(
    "path", ["/nope", "/health/", "/Health", "/static/app.py", "/%ff", "/%0d%0aX-Planted:%201"]
)
def test_an_unknown_path_is_404_as_json(client, path):
    response = client.get(path)
    assert (response.status_code, response.content_type, set(response.json)) == (
        404,
        "application/json",
        {"error"},
    )
    assert isinstance(response.json["error"], str) and "X-Planted" not in response.headers


@pytest.mark.parametrize("path", ["/", "/health"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"])
def test_a_wrong_method_is_405_and_says_what_is_allowed(client, redis_server, path, method):
    response = client.open(path, method=method)
    assert (response.status_code, response.content_type, set(response.json)) == (
        405,
        "application/json",
        {"error"},
    )
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert hit(client) == (1, None)


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_and_options_have_no_body_and_count_nothing(client, redis_server, path):
    head, options = client.head(path), client.options(path)
    assert (head.status_code, head.data, head.content_type) == (200, b"", "application/json")
    assert (options.status_code, options.data) == (200, b"")
    assert set(options.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert hit(client) == (1, None)


def test_a_crash_is_a_500_that_leaks_nothing_and_a_logged_traceback(
    app, client, monkeypatch, caplog
):
    def crash(*_):
        raise LookupError("secret detail")

    monkeypatch.setattr(app.socket, "gethostname", crash)
    response = client.get("/health")
    assert (response.status_code, response.content_type, set(response.json)) == (
        500,
        "application/json",
        {"error"},
    )
    assert "secret" not in response.text and "Traceback" not in response.text
    assert "Traceback" in caplog.text and "secret detail" in caplog.text
