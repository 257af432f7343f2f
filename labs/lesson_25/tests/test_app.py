"""The app's responses, without a server: what each route returns, and how it calls Redis."""

import importlib.util
import sys

import pytest
import redis

from harness.clients import hit, redis_ok
from harness.engine import CONTEXT
from harness.peers import peer, self_signed


@pytest.fixture
def configure(monkeypatch):
    """A function that sets environment variables."""

    def set_all(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.fixture
def patient(app, monkeypatch):
    """Have the app wait long for a reply, because a busy machine may delay that of a peer."""
    monkeypatch.setattr(app, "STEP_SECONDS", 20)


# What the routes return


@pytest.mark.parametrize(
    ("settings", "env", "version", "build_date"),
    [
        ({"LAB_ENV": "", "BUILD_VERSION": "", "BUILD_DATE": ""}, "dev", "dev", "unknown"),
        ({"LAB_ENV": "lab", "BUILD_VERSION": "1.2.3", "BUILD_DATE": "now"}, "lab", "1.2.3", "now"),
    ],
)
def test_routes_return_all_fields(
    client, redis_server, configure, settings, env, version, build_date
):
    configure(**settings)
    # Swarm gives names with an underscore.
    index = client.get("/", headers={"Host": "lab25_web:8080"})
    assert index.json == {
        "message": "Hello from lab25",
        "path": "/",
        "host": "lab25_web:8080",
        "env": env,
        "hit_count": 1,
        "redis_error": None,
    }
    health = client.get("/health")
    fields = health.json
    assert isinstance(fields.pop("uptime_seconds"), int)
    assert isinstance(fields.pop("hostname"), str)
    assert fields == {
        "status": "ok",
        "env": env,
        "redis_ok": True,
        "version": version,
        "build_date": build_date,
    }
    for response in (index, health):
        assert (response.status_code, response.content_type) == (200, "application/json")
        assert response.headers.get("Cache-Control") == "no-store", "a cache may keep the answer"


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/nope", "lab25", 404),
        ("GET", "/static/app.py", "lab25", 404),
        ("POST", "/", "lab25", 405),
        ("GET", "/", "a..b", 400),
    ],
)
def test_errors_are_json_and_count_nothing(client, redis_server, method, path, host, status):
    response = client.open(path, method=method, headers={"Host": host})
    assert (response.status_code, response.content_type) == (status, "application/json")
    assert set(response.json) == {"error"}
    assert response.headers.get("Cache-Control") == "no-store", "a cache may keep the error"
    if status == 405:
        allowed = set(response.headers.get("Allow", "").split(", "))
        assert allowed == {"GET", "HEAD", "OPTIONS"}, f"a 405 must have them in Allow: {allowed}"
    assert hit(client) == (1, None), "a request that failed was counted"


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_head_and_options_count_nothing(client, redis_server, method):
    for path in ("/", "/health"):
        response = client.open(path, method=method)
        assert (response.status_code, response.data) == (200, b"")
    assert hit(client) == (1, None), f"a {method} was counted"


def test_bug_is_logged_and_stops_no_other_hit(app, client, redis_server, monkeypatch, caplog):
    def fail(*_):
        raise KeyError("secret detail")

    with monkeypatch.context() as bug:
        bug.setattr(app._redis_client, "incr", fail)
        response = client.get("/")
    assert response.status_code == 500, f"a bug must be a 500, got {response.text}"
    assert set(response.json) == {"error"}
    assert "secret" not in response.text, f"the answer shows the bug: {response.text}"
    assert response.headers.get("Cache-Control") == "no-store", "a cache may keep the error"
    assert "Traceback" in caplog.text and "secret detail" in caplog.text
    assert hit(client) == (1, None), "after a bug in one request, the next is not counted"


# Counting


def test_counts_once_per_request(client, redis_server):
    hits = [hit(client) for _ in range(3)]
    assert hits == [(1, None), (2, None), (3, None)], f"three hits must count to 3, got {hits}"
    assert redis_ok(client) is True
    assert hit(client) == (4, None), "a /health was counted"


def test_counts_nothing_without_configured_redis(client, configure):
    configure(REDIS_HOST="", REDIS_URL="", REDIS_PORT="tcp://10.0.0.1:6379")  # as Kubernetes does
    assert hit(client) == (None, None)
    assert redis_ok(client) is False


def test_app_needs_neither_serve_nor_redis_package(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)  # import redis fails
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(CONTEXT)])
    spec = importlib.util.spec_from_file_location("alone", CONTEXT / "app.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    client = alone.app.test_client()
    assert hit(client) == (None, None)
    configure(REDIS_HOST="redis.example")
    number, reason = hit(client)
    assert "the package redis is not installed" in str(reason), f"got hit {number}, {reason}"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"REDIS_HOST": "r", "REDIS_PORT": "http"}, "ValueError: REDIS_PORT must be"),
        ({"REDIS_HOST": "a..b"}, "Unicode"),
    ],
)
def test_bad_setting_is_reported_in_redis_error(client, configure, settings, error):
    """`python serve.py` rejects all except the last. Others may run the app in another server."""
    configure(**settings)
    _, reason = hit(client)
    assert str(reason).startswith(error), f"the reason must start with {error!r}, got {reason!r}"
    assert redis_ok(client) is False


# How Redis is called, and what it may reply


def test_hit_without_reply_is_never_repeated(app, client, monkeypatch, configure):
    commands = []

    def stay_silent(request):
        commands.append(request.splitlines()[2])
        return b"+OK\r\n" if b"SETINFO" in request else b""

    monkeypatch.setattr(app, "STEP_SECONDS", 0.2)
    with peer(stay_silent) as port:
        configure(REDIS_HOST="127.0.0.1", REDIS_PORT=str(port))
        number, error = hit(client)
    assert commands == [b"CLIENT", b"CLIENT", b"INCRBY"], f"a hit must be one INCRBY: {commands}"
    assert number is None and error.startswith("TimeoutError: "), (
        f"a silent Redis must be given up, got hit {number}, {error}"
    )


def test_redis_ok_is_false_while_hits_fail(client, configure, patient):
    """A read-only Redis still answers a PING."""
    with peer(lambda request: b"+PONG\r\n" if b"PING" in request else b"-READONLY\r\n") as port:
        configure(REDIS_HOST="127.0.0.1", REDIS_PORT=str(port))
        assert redis_ok(client) is False, "redis_ok must be false while no hit counts"


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (None, "ConnectionError: Connection closed by server."),
        (b"+OK\r\n", "RedisError: the count must be a number, got b'OK'; is this Redis?"),
        (
            b"-DENIED because\t" + b"because " * 120 + b"\r\n",
            "ResponseError: DENIED because because",
        ),
        (b"-ERR what is AUTH pass-word?\r\n", "ResponseError: what is AUTH ***?"),
        (
            b"-ERR unknown command 'AUTH', with args beginning with: 'pass-w\r\n",
            "ResponseError: unknown command 'AUTH'",
        ),
    ],
)
def test_redis_error_is_short_line_without_password(client, configure, patient, reply, error):
    with peer(lambda _: reply) as port:
        configure(REDIS_HOST="127.0.0.1", REDIS_PORT=str(port), REDIS_PASSWORD="pass-word")
        _, reason = hit(client)
    assert str(reason).startswith(error), f"the reason must start with {error!r}, got {reason!r}"
    assert len(reason) <= 200 and len(reason.splitlines()) == 1, f"not a short line: {reason!r}"
    assert "pass-w" not in reason, f"a part of the password is shown: {reason!r}"


def test_redis_error_hides_password_of_url(client, configure, patient):
    with peer(lambda _: b"-ERR what is AUTH pass-word?\r\n") as port:
        configure(REDIS_URL=f"redis://:pass%2Dword@127.0.0.1:{port}")
        assert hit(client) == (None, "ResponseError: what is AUTH ***?")


# Which Redis is called


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"REDIS_HOST": "r"}, {"host": "r", "port": 6379, "db": 0, "password": None}),
        (
            {"REDIS_HOST": "::1", "REDIS_PORT": "1", "REDIS_DB": "2", "REDIS_PASSWORD": "p"},
            {"host": "::1", "port": 1, "db": 2, "password": "p"},
        ),
        (
            {"REDIS_URL": "redis://u:a%2Fb@r:1/2", "REDIS_HOST": "h", "REDIS_PORT": "tcp://h:1"},
            {"host": "r", "port": 1, "db": 2, "username": "u", "password": "a/b"},
        ),
        ({"REDIS_URL": "unix:///redis.sock", "REDIS_PASSWORD": "p"}, {"password": "p"}),
        ({"REDIS_URL": "redis://r"}, {"socket_timeout": 0.5, "socket_connect_timeout": 0.5}),
        # An option in REDIS_URL overrides our limit.
        ({"REDIS_URL": "redis://r?socket_timeout=60"}, {"socket_timeout": 60}),
    ],
)
def test_variables_configure_redis(app, configure, settings, expected):
    configure(**settings)
    client = app.get_redis_client()
    options = client.get_connection_kwargs()
    seen = {name: options[name] for name in expected}
    assert seen == expected, f"{settings} must set {expected}, got {seen}"
    assert app.get_redis_client() is client, "each request creates a client of its own"


def test_password_is_line_of_file(app, configure, tmp_path):
    (tmp_path / "password").write_bytes(b" pass  word \r\n")
    configure(REDIS_HOST="r", REDIS_PASSWORD_FILE=str(tmp_path / "password"))
    assert app.get_redis_client().get_connection_kwargs()["password"] == " pass  word "


def test_tls_requires_trusted_certificate(app, client, configure, patient, monkeypatch, tmp_path):
    def reply(request):
        return b":1\r\n" if b"INCRBY" in request else b"+OK\r\n" * request.count(b"SETINFO")

    certificate, context = self_signed(tmp_path)
    with peer(reply, tls=context) as port:
        url = f"rediss://127.0.0.1:{port}"
        configure(REDIS_URL=f"{url}?ssl_ca_certs={certificate}")
        for _ in range(10):  # a server may send its session tickets early or late
            assert hit(client) == (1, None)
            app.get_redis_client().connection_pool.disconnect()
        configure(REDIS_URL=url)
        monkeypatch.setattr(app, "_redis_client", None)
        number, error = hit(client)
    assert "CERTIFICATE_VERIFY_FAILED" in str(error), f"not refused: hit {number}, {error}"


# What a test can replace, and a route of your own use


def test_uses_replaced_get_redis_client(app, client, redis_server, monkeypatch):
    monkeypatch.setattr(app, "get_redis_client", lambda: None)
    assert hit(client) == (None, None)


def count_visitors(client):
    """Return how many visitors there are, or None if the key holds something else."""
    try:
        return client.scard("lab25_visitors")
    except redis.exceptions.ResponseError as error:
        if str(error).startswith("WRONGTYPE"):
            return None
        raise


def test_own_operation_handles_its_own_key(app, client, redis_server):
    """The example of the app's README."""
    redis_client = app.get_redis_client()
    redis_client.sadd("lab25_visitors", "Ada")
    assert app.call_redis(count_visitors) == (1, None)
    redis_client.set("lab25_visitors", "no set")
    assert app.call_redis(count_visitors) == (None, None)
    assert hit(client) == (1, None)
