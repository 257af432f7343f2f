"""The app's answers, with a Redis that is there, away, or wrong."""

import logging
import socket
import threading
import time

import fakeredis
import pytest
import redis

BACK_WITHIN_SECONDS = 2


def hit(client):
    """Return (hit_count, redis_error) of one GET /."""
    response = client.get("/")
    assert response.status_code == 200
    return response.json["hit_count"], response.json["redis_error"]


def counts_within(client, seconds=BACK_WITHIN_SECONDS):
    """Return the first number handed out within `seconds`, or None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        number, _ = hit(client)
        if number is not None:
            return number
        time.sleep(0.02)
    return None


# The answers


def test_index_answers_with_every_field(client, redis_server):
    response = client.get("/", headers={"Host": "lab25.example:8080"})
    assert response.status_code == 200
    assert response.content_type == "application/json"
    assert response.json == {
        "message": "Hello from lab25",
        "path": "/",
        "host": "lab25.example:8080",
        "env": "dev",
        "hit_count": 1,
        "redis_error": None,
    }


def test_health_answers_with_every_field(client, redis_server):
    response = client.get("/health")
    assert response.status_code == 200
    assert response.content_type == "application/json"
    answer = response.json
    assert isinstance(answer.pop("uptime_seconds"), int)
    assert isinstance(answer.pop("hostname"), str)
    assert answer == {"status": "ok", "env": "dev", "redis_ok": True, "version": "dev", "build_date": "unknown"}


@pytest.mark.parametrize("value, shown", [("prod", "prod"), ("", "dev")])
def test_env_is_shown_and_empty_means_unset(client, monkeypatch, value, shown):
    monkeypatch.setenv("LAB_ENV", value)
    assert client.get("/").json["env"] == client.get("/health").json["env"] == shown


def test_health_shows_the_build(client, monkeypatch):
    monkeypatch.setenv("BUILD_VERSION", "0a1b2c3")
    monkeypatch.setenv("BUILD_DATE", "2025-11-24T08:00:00Z")
    answer = client.get("/health").json
    assert (answer["version"], answer["build_date"]) == ("0a1b2c3", "2025-11-24T08:00:00Z")


# Counting


def test_counts_once_per_request(client, redis_server):
    assert [hit(client) for _ in range(3)] == [(1, None), (2, None), (3, None)]
    assert fakeredis.FakeRedis(server=redis_server).get("lab25_hits") == b"3"


def test_health_head_and_options_count_nothing(client, redis_server):
    client.get("/health")
    client.head("/")
    client.head("/health")
    client.options("/")
    assert hit(client) == (1, None)


def test_many_threads_get_different_numbers(app, redis_server):
    numbers = []

    def visit():
        client = app.app.test_client()
        numbers.extend(hit(client)[0] for _ in range(10))

    threads = [threading.Thread(target=visit) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 201))


def test_counts_nothing_where_redis_is_not_configured(client, monkeypatch):
    assert hit(client) == (None, None)
    assert client.get("/health").json["redis_ok"] is False
    monkeypatch.setenv("REDIS_HOST", "")
    monkeypatch.setenv("REDIS_PORT", "nonsense")
    assert hit(client) == (None, None)


# The four seams


def test_follows_a_replaced_get_redis_client(app, client, monkeypatch):
    fake = fakeredis.FakeRedis()
    monkeypatch.setattr(app, "get_redis_client", lambda: fake)
    assert hit(client) == (1, None)
    monkeypatch.setattr(app, "get_redis_client", lambda: None)
    assert hit(client) == (None, None)


def test_uses_a_replaced_client_whatever_the_environment_says(app, client, redis_server, monkeypatch):
    monkeypatch.setenv("REDIS_PORT", "nonsense")
    assert hit(client) == (1, None)


def test_calls_redis_with_host_port_and_db_by_keyword(app, client, monkeypatch):
    calls = []

    def connect(*args, **kwargs):
        calls.append((args, kwargs["host"], kwargs["port"], kwargs["db"]))
        return fakeredis.FakeRedis()

    monkeypatch.setattr(app.redis, "Redis", connect)
    monkeypatch.setenv("REDIS_HOST", "redis.example")
    assert hit(client) == (1, None)
    monkeypatch.setattr(app, "_redis_client", None)
    monkeypatch.setenv("REDIS_PORT", "6380")
    monkeypatch.setenv("REDIS_DB", "3")
    assert hit(client) == (1, None)
    assert hit(client) == (2, None)
    assert calls == [((), "redis.example", 6379, 0), ((), "redis.example", 6380, 3)]


def test_fakeredis_can_stand_in_for_the_class(app, client, monkeypatch):
    monkeypatch.setattr(app.redis, "Redis", fakeredis.FakeRedis)
    monkeypatch.setenv("REDIS_HOST", "redis.example")
    assert hit(client)[0] is not None


def test_follows_a_replaced_class_at_once_though_a_client_of_another_is_there(app, client, monkeypatch, unused_port):
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT", str(unused_port))
    assert hit(client)[0] is None
    fake = fakeredis.FakeRedis()
    monkeypatch.setattr(app.redis, "Redis", lambda **_: fake)
    assert hit(client) == (1, None)
    monkeypatch.setattr(app, "redis", None)
    assert hit(client) == (None, None)


def test_serves_without_the_redis_package(app, client, monkeypatch):
    monkeypatch.setattr(app, "redis", None)
    monkeypatch.setenv("REDIS_HOST", "redis.example")
    assert app.get_redis_client() is None
    assert hit(client) == (None, None)


def test_a_client_is_made_without_a_connection(app, monkeypatch):
    monkeypatch.setenv("REDIS_HOST", "192.0.2.1")
    started = time.monotonic()
    assert app.get_redis_client() is app.get_redis_client() is not None
    assert time.monotonic() - started < 0.5


def test_a_new_client_is_asked_at_once_after_another_failed(app, client, redis_server, monkeypatch):
    redis_server.connected = False
    assert hit(client)[0] is None
    monkeypatch.setattr(app, "_redis_client", fakeredis.FakeRedis())
    assert hit(client) == (1, None)


def test_a_bad_setting_without_the_check_at_the_start_is_no_crash(client, monkeypatch):
    monkeypatch.setenv("REDIS_HOST", "redis.example")
    monkeypatch.setenv("REDIS_PORT", "http")
    number, error = hit(client)
    assert number is None and "REDIS_PORT is 'http'" in error


def test_a_new_connection_begins_with_the_hit(app, client, monkeypatch):
    """No handshake: each of its steps could wait for a frozen Redis once more."""
    monkeypatch.setattr(app, "WAIT_SECONDS", 0.1)
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("REDIS_PORT", str(silent.getsockname()[1]))
        assert hit(client)[0] is None
        with silent.accept()[0] as connection:
            assert connection.recv(4096).splitlines()[2].startswith(b"INCR")


# A Redis that is away, or wrong


def test_says_why_where_redis_refuses_the_first_contact(client, monkeypatch, unused_port):
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT", str(unused_port))
    started = time.monotonic()
    number, error = hit(client)
    assert number is None and "refused" in error.lower()
    answer = client.get("/health")
    assert (answer.status_code, answer.json["redis_ok"]) == (200, False)
    assert time.monotonic() - started < 0.5


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
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 2, "one line when Redis goes, one when it is back"
    assert error in lines[0] and "back" in lines[1]


def test_health_alone_notices_that_redis_is_back(client, redis_server, caplog):
    redis_server.connected = False
    assert client.get("/health").json["redis_ok"] is False
    redis_server.connected = True
    deadline = time.monotonic() + BACK_WITHIN_SECONDS
    while not client.get("/health").json["redis_ok"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(caplog.records) == 2


def test_a_failed_count_is_not_sent_again(app, client, monkeypatch):
    class Lossy(fakeredis.FakeRedis):
        sent = 0

        def incr(self, *args):
            self.sent += 1
            super().incr(*args)
            raise redis.TimeoutError("Timeout reading from socket")

    lossy = Lossy()
    monkeypatch.setattr(app, "_redis_client", lossy)
    assert hit(client) == (None, "Timeout reading from socket")
    assert lossy.sent == 1


def test_the_real_client_does_not_retry(app, monkeypatch):
    monkeypatch.setenv("REDIS_HOST", "192.0.2.1")
    options = app.get_redis_client().connection_pool.connection_kwargs
    assert options["retry"].get_retries() == 0
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (1, 1)


def test_answers_at_once_while_one_request_waits_for_a_frozen_redis(app, client, monkeypatch):
    class Frozen(fakeredis.FakeRedis):
        asked = 0

        def incr(self, *args):
            self.asked += 1
            time.sleep(0.3)
            raise redis.TimeoutError("Timeout reading from socket")

    frozen = Frozen()
    monkeypatch.setattr(app, "_redis_client", frozen)
    monkeypatch.setattr(app, "PAUSE_SECONDS", 0.1)
    hit(client)
    time.sleep(0.1)
    waiting = threading.Thread(target=hit, args=[app.app.test_client()])
    waiting.start()
    time.sleep(0.05)
    started = time.monotonic()
    assert [hit(client) for _ in range(20)] == [(None, "Timeout reading from socket")] * 20
    assert time.monotonic() - started < 0.2
    waiting.join()
    hit(client)
    assert frozen.asked == 2


def test_a_late_failure_of_an_outage_that_is_over_makes_no_new_one(app, client, monkeypatch, caplog):
    outcomes = iter([(0.3, False), (0, False), (0, True), (0, True)])  # seconds to an answer, and whether it is one

    class Uneven(fakeredis.FakeRedis):
        def incr(self, *args):
            seconds, answers = next(outcomes)
            time.sleep(seconds)
            if not answers:
                raise redis.ConnectionError("Connection refused")
            return super().incr(*args)

    monkeypatch.setattr(app, "_redis_client", Uneven())
    monkeypatch.setattr(app, "PAUSE_SECONDS", 0.05)
    late = threading.Thread(target=hit, args=[app.app.test_client()])
    late.start()
    time.sleep(0.05)
    assert hit(client)[0] is None
    assert counts_within(client) == 1
    late.join()
    assert hit(client) == (2, None)
    assert len(caplog.records) == 2


def test_a_late_success_from_before_an_outage_does_not_end_it(app, client, redis_server, monkeypatch, caplog):
    class Late(fakeredis.FakeRedis):
        def incr(self, *args):
            answer = super().incr(*args)
            if answer == 1:
                time.sleep(0.3)
            return answer

    monkeypatch.setattr(app, "_redis_client", Late(server=redis_server))
    late = threading.Thread(target=hit, args=[app.app.test_client()])
    late.start()
    time.sleep(0.1)
    redis_server.connected = False
    assert hit(client)[0] is None
    late.join()
    assert hit(client)[0] is None
    assert len(caplog.records) == 1


def test_a_ping_does_not_end_an_outage_of_hits(app, client, monkeypatch, caplog):
    class Stuck(fakeredis.FakeRedis):
        def incr(self, *args):
            raise redis.TimeoutError("Timeout reading from socket")

    monkeypatch.setattr(app, "_redis_client", Stuck())
    monkeypatch.setattr(app, "PAUSE_SECONDS", 0)
    for _ in range(3):
        assert hit(client)[0] is None
        assert client.get("/health").json["redis_ok"] is True
    assert len(caplog.records) == 1


def test_a_key_of_the_wrong_type_is_named_and_counting_goes_on_once_it_is_gone(app, client, redis_server, caplog):
    other = fakeredis.FakeRedis(server=redis_server)
    other.lpush("lab25_hits", "not a number")
    for _ in range(3):
        number, error = hit(client)
        assert number is None and "WRONGTYPE" in error
        assert client.get("/health").json["redis_ok"] is True
    other.delete("lab25_hits")
    assert hit(client) == (1, None)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("answer", [b"OK", "1", None, True, [1]])
def test_an_answer_that_is_no_number_is_no_count(app, client, monkeypatch, answer):
    class Odd(fakeredis.FakeRedis):
        def incr(self, *args):
            return answer

    monkeypatch.setattr(app, "_redis_client", Odd())
    number, error = hit(client)
    assert number is None and repr(answer) in error


@pytest.mark.parametrize(
    "speech", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n", b"SSH-2.0-OpenSSH\r\n", b"$-5\r\n", b"\xff\x00", b""]
)
def test_a_peer_that_is_no_redis_is_no_count(client, monkeypatch, peer, speech):
    monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
    monkeypatch.setenv("REDIS_PORT", str(peer(speech)))
    number, error = hit(client)
    assert number is None and isinstance(error, str) and error
    answer = client.get("/health")
    assert (answer.status_code, answer.json["redis_ok"]) == (200, False)


# What HTTP asks for


@pytest.mark.parametrize("path", ["/nope", "/health/", "/Health", "/static/app.py", "/%ff", "/%0d%0aX-Planted:%201"])
def test_an_unknown_path_is_404_as_json(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert response.content_type == "application/json"
    assert set(response.json) == {"error"} and isinstance(response.json["error"], str)
    assert "X-Planted" not in response.headers


@pytest.mark.parametrize("path", ["//", "//health", "///health"])
def test_a_double_slash_is_404(client, redis_server, path):
    response = client.get("/", environ_overrides={"PATH_INFO": path})
    assert response.status_code == 404
    assert set(response.json) == {"error"}
    assert hit(client) == (1, None)


@pytest.mark.parametrize("path", ["/", "/health"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"])
def test_a_wrong_method_is_405_and_says_what_is_allowed(client, redis_server, path, method):
    response = client.open(path, method=method)
    assert response.status_code == 405
    assert response.content_type == "application/json"
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert set(response.json) == {"error"}
    assert hit(client) == (1, None)


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_and_options_have_no_body(client, redis_server, path):
    head = client.head(path)
    assert (head.status_code, head.data, head.content_type) == (200, b"", "application/json")
    assert ("Content-Length" in head.headers) == (path == "/health"), "a length that depends on the number is not told"
    options = client.options(path)
    assert (options.status_code, options.data) == (200, b"")
    assert set(options.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}


def test_a_crash_is_a_500_that_leaks_nothing_and_a_logged_traceback(app, client, monkeypatch, caplog):
    def crash(*_):
        raise LookupError("secret detail")

    monkeypatch.setattr(app.socket, "gethostname", crash)
    response = client.get("/health")
    assert response.status_code == 500
    assert response.content_type == "application/json"
    assert set(response.json) == {"error"}
    assert "secret" not in response.text and "Traceback" not in response.text
    (record,) = caplog.records
    assert "Traceback" in logging.Formatter().format(record) and "secret detail" in logging.Formatter().format(record)
