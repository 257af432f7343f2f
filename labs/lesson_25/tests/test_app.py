"""The app's answers without a server, where every request asks Redis."""

import contextlib
import subprocess
import sys
import unittest.mock

import fakeredis
import pytest
import redis

from harness.engine import CONTEXT
from harness.peers import peer


@pytest.fixture
def redis_peer(monkeypatch):
    """A function that puts something else than Redis at REDIS_HOST; it says `answer(said)`."""
    with contextlib.ExitStack() as peers:

        def start(answer):
            monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
            monkeypatch.setenv("REDIS_PORT", str(peers.enter_context(peer(answer))))

        yield start


def hit(client):
    """Return (hit_count, redis_error) of one GET /."""
    response = client.get("/")
    assert response.status_code == 200, f"GET / must never fail: {response.text}"
    return response.json["hit_count"], response.json["redis_error"]


def redis_ok(client):
    """Return what /health says of Redis."""
    response = client.get("/health")
    assert response.status_code == 200, f"/health must never fail: {response.text}"
    return response.json["redis_ok"]


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
    assert index.json == {
        "message": "Hello from lab25",
        "path": "/",
        "host": "lab25.example:8080",
        "env": env,
        "hit_count": 1,
        "redis_error": None,
    }
    health = client.get("/health")
    answer = health.json
    assert isinstance(answer.pop("uptime_seconds"), int)
    assert isinstance(answer.pop("hostname"), str)
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
    monkeypatch.setenv("REDIS_HOST", "")
    monkeypatch.setenv("REDIS_PORT", "tcp://10.0.0.1:6379")  # as a cluster sets it
    assert hit(client) == (None, None)
    assert redis_ok(client) is False


def test_the_app_stands_alone():
    """Loaded by its path it needs no other file of the project, and checks no setting."""
    program = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.app.test_client().get("/").status_code)
"""
    environment = {"PORT": "http", "REDIS_PORT": "nonsense", "WEB_CONCURRENCY": "0"}
    command = [sys.executable, "-I", "-c", program, CONTEXT / "app.py"]
    assert subprocess.check_output(command, env=environment, cwd="/", text=True) == "200\n"


# The four seams: what a test may replace


def test_uses_a_replaced_client_as_it_is_whatever_the_environment_says(
    app, client, redis_server, monkeypatch
):
    monkeypatch.setenv("REDIS_HOST", "two words")
    monkeypatch.setenv("REDIS_PORT", "nonsense")
    assert hit(client) == (1, None)
    monkeypatch.setattr(app, "_redis_client", fakeredis.FakeRedis())
    assert hit(client) == (1, None)


def test_uses_a_replaced_get_redis_client(app, client, redis_server, monkeypatch):
    monkeypatch.setattr(app, "get_redis_client", lambda: None)
    assert hit(client) == (None, None)
    fake = fakeredis.FakeRedis()
    monkeypatch.setattr(app, "get_redis_client", lambda: fake)
    assert hit(client) == (1, None)


def test_makes_its_client_of_the_class_that_redis_has_then(app, client, monkeypatch):
    made = []

    def make(**options):
        made.append(options)
        return fakeredis.FakeRedis()

    monkeypatch.setenv("REDIS_HOST", "redis.example")
    monkeypatch.setattr(app.redis, "Redis", make)
    assert [hit(client)[0], hit(client)[0]] == [1, 2]
    (options,) = made
    assert (options["host"], options["port"], options["db"]) == ("redis.example", 6379, 0)


def test_a_missing_package_wins_over_a_client_that_is_there(app, client, redis_server, monkeypatch):
    assert hit(client) == (1, None)
    monkeypatch.setattr(app, "redis", None)
    assert app.get_redis_client() is None
    assert hit(client) == (None, None)


@pytest.mark.parametrize("variable", ["REDIS_HOST", "REDIS_URL"])
def test_says_that_the_package_is_missing_where_redis_is_configured(
    app, client, monkeypatch, variable
):
    monkeypatch.setattr(app, "redis", None)
    monkeypatch.setenv(variable, "redis.example")
    number, error = hit(client)
    assert number is None and "package redis is not installed" in error


@pytest.mark.parametrize("stand_in", [unittest.mock.Mock(), type("Client", (), {})()])
def test_a_client_that_is_a_plain_stand_in_may_fail(app, client, monkeypatch, stand_in):
    stand_in.incr = unittest.mock.Mock(side_effect=redis.ConnectionError("gone"))
    monkeypatch.setattr(app, "_redis_client", stand_in)
    assert hit(client) == (None, "ConnectionError: gone")
    stand_in.incr.assert_called_once_with("lab25_hits")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"REDIS_HOST": "redis.example", "REDIS_PORT": "http"}, "REDIS_PORT is 'http'"),
        ({"REDIS_URL": "redis://default:s3cret"}, "REDIS_URL"),
        ({"REDIS_HOST": "r", "REDIS_PASSWORD_FILE": "/nowhere"}, "REDIS_PASSWORD_FILE"),
    ],
)
def test_a_bad_setting_without_the_check_at_the_start_is_no_crash(
    client, monkeypatch, settings, named
):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    number, error = hit(client)
    assert number is None and named in error and "s3cret" not in error


# A question of your own, as the app's README shows it


def count_visitors(client):
    """Return how many visitors there are, or None where the key holds something else."""
    try:
        return client.scard("lab25_visitors")
    except redis.exceptions.ResponseError as error:
        if str(error).startswith("WRONGTYPE"):
            return None
        raise


def test_a_question_whose_key_holds_something_else_is_no_failure_of_redis(app, redis_server):
    redis_client = app.get_redis_client()
    redis_client.sadd("lab25_visitors", "Ada")
    assert app.ask_redis(count_visitors) == (1, None)
    redis_client.set("lab25_visitors", "no set")
    assert app.ask_redis(count_visitors) == (None, None)


# A Redis that is away, or wrong


def test_says_why_while_redis_is_away_and_counts_again_after(client, redis_server):
    assert hit(client) == (1, None)
    redis_server.connected = False
    for _ in range(3):
        number, error = hit(client)
        assert number is None and error.startswith("ConnectionError: ")
    assert redis_ok(client) is False
    redis_server.connected = True
    assert hit(client) == (2, None)
    assert redis_ok(client) is True


def test_a_hit_is_the_first_word_to_redis_and_is_not_sent_again(
    app, client, monkeypatch, redis_peer
):
    """No handshake: each of its steps would wait for a frozen Redis once more."""
    said = []

    def say_nothing(words):
        said.append(words.splitlines()[2])
        return b""

    monkeypatch.setattr(app, "WAIT_SECONDS", 0.2)
    redis_peer(say_nothing)
    number, error = hit(client)
    assert said == [b"INCRBY"], f"besides one INCRBY, Redis was asked {said}"
    assert number is None and error.startswith("TimeoutError: "), (
        f"a Redis that does not answer was not given up: hit {number}, {error}"
    )


def test_a_user_that_may_count_but_not_ping_counts_and_redis_is_ok(app, client, redis_peer):
    def refuse_pings(said):
        if b"PING" in said:
            return b"-NOPERM this user has no permissions to run the 'ping' command\r\n"
        return b":1\r\n"

    redis_peer(refuse_pings)
    assert redis_ok(client) is True, "a Redis that has answered is called away"
    assert hit(client) == (1, None)


def test_a_key_of_the_wrong_type_is_no_count(client, redis_server):
    other = fakeredis.FakeRedis(server=redis_server)
    other.lpush("lab25_hits", "not a number")
    number, error = hit(client)
    assert number is None and "WRONGTYPE" in error
    other.delete("lab25_hits")
    assert hit(client) == (1, None)


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
def test_a_peer_that_is_no_redis_is_no_count(client, redis_peer, speech):
    redis_peer(lambda _: speech)
    number, error = hit(client)
    assert number is None and isinstance(error, str) and error
    assert redis_ok(client) is False


@pytest.mark.parametrize(
    ("speech", "error"),
    [
        ("MOVED 3035 172.19.0.4:6379", "MovedError: 3035 172.19.0.4:6379"),
        ("NOPERM no permissions", "NoPermissionError: no permissions"),
        ("NOAUTH Authentication required.", "AuthenticationError: Authentication required."),
        (
            "ERR unknown command 'AUTH', with args beginning with: 'pass-w",
            "ResponseError: unknown command 'AUTH'",
        ),
        ("ERR what is AUTH pass-word?", "ResponseError: what is AUTH ***?"),
    ],
)
def test_an_error_that_redis_answers_is_named_and_shows_no_password(
    client, monkeypatch, redis_peer, speech, error
):
    monkeypatch.setenv("REDIS_PASSWORD", "pass-word")
    redis_peer(lambda _: f"-{speech}\r\n".encode())
    assert hit(client) == (None, error)


def test_an_error_of_a_thousand_characters_is_told_in_one_short_line(client, redis_peer):
    redis_peer(
        lambda _: b"-DENIED Redis is running in protected mode\t" + b"because " * 120 + b"\r\n"
    )
    _, error = hit(client)
    assert error.startswith("ResponseError: DENIED Redis is running in protected mode because")
    assert len(error) <= 200


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
        ({"REDIS_URL": "redis://r:1/2"}, {"host": "r", "port": 1, "db": 2, "password": None}),
        ({"REDIS_URL": "redis://r", "REDIS_PORT": "tcp://10.0.0.1:6379"}, {"host": "r"}),
        ({"REDIS_URL": "redis://:a%2Fb%40c@[::1]:1"}, {"host": "::1", "password": "a/b@c"}),
        ({"REDIS_URL": "rediss://u:p@r?ssl_ca_certs=ca"}, {"username": "u", "ssl_ca_certs": "ca"}),
        ({"REDIS_URL": "unix:///run/r.sock?db=1"}, {"path": "/run/r.sock", "db": 1}),
        ({"REDIS_URL": "redis://u@r", "REDIS_PASSWORD": "p"}, {"username": "u", "password": "p"}),
    ],
)
def test_redis_is_where_the_variables_say(app, monkeypatch, settings, expected):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = app.get_redis_client()
    assert app.get_redis_client() is client
    options = client.get_connection_kwargs()
    assert {name: options[name] for name in expected} == expected
    assert options["socket_timeout"] == options["socket_connect_timeout"] == 0.5
    assert options["retry"].get_retries() == 0


def test_a_name_with_tls_is_asked_with_tls(app, monkeypatch):
    monkeypatch.setenv("REDIS_URL", "rediss://r")
    assert app.get_redis_client().connection_pool.connection_class is redis.SSLConnection


@pytest.mark.parametrize("content", [" pass  word ", " pass  word \n", " pass  word \r\n"])
def test_the_password_is_what_the_file_holds_without_its_line_end(
    app, monkeypatch, tmp_path, content
):
    (tmp_path / "password").write_bytes(content.encode())
    monkeypatch.setenv("REDIS_HOST", "redis.example")
    monkeypatch.setenv("REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    assert app.get_redis_client().get_connection_kwargs()["password"] == " pass  word "


# What HTTP asks for


@pytest.mark.parametrize(
    "path", ["/nope", "/health/", "/Health", "/static/app.py", "/%ff", "/%0d%0aX-Planted:%201"]
)
def test_an_unknown_path_is_404_as_json(client, path):
    response = client.get(path)
    assert (response.status_code, response.content_type) == (404, "application/json")
    assert set(response.json) == {"error"}
    assert isinstance(response.json["error"], str)
    assert "X-Planted" not in response.headers


@pytest.mark.parametrize("path", ["/", "/health"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"])
def test_a_wrong_method_is_405_and_says_what_is_allowed(client, redis_server, path, method):
    response = client.open(path, method=method)
    assert (response.status_code, response.content_type) == (405, "application/json")
    assert set(response.json) == {"error"}
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert hit(client) == (1, None)


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_and_options_have_no_body_and_count_nothing(client, redis_server, path):
    head = client.head(path)
    assert (head.status_code, head.data, head.content_type) == (200, b"", "application/json")
    options = client.options(path)
    assert (options.status_code, options.data) == (200, b"")
    assert set(options.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    number, error = hit(client)
    assert (number, error) == (1, None), f"a HEAD or OPTIONS counted: the first hit has {number}"


def test_a_crash_is_a_500_that_leaks_nothing_and_a_logged_traceback(
    app, client, monkeypatch, caplog
):
    def crash(*_):
        raise LookupError("secret detail")

    monkeypatch.setattr(app.socket, "gethostname", crash)
    response = client.get("/health")
    assert (response.status_code, response.content_type) == (500, "application/json")
    assert set(response.json) == {"error"}
    assert "secret" not in response.text and "Traceback" not in response.text
    assert "Traceback" in caplog.text and "secret detail" in caplog.text
