"""Which settings are rejected at startup, each with one line. No server is started here."""

import os
import runpy
import socket
import subprocess
import sys
import unittest.mock

import flask
import pytest

import serve
from harness import limits
from harness.engine import CONTEXT, free_port


def run_app():
    """Run `python app.py`."""
    runpy.run_path(str(CONTEXT / "app.py"), run_name="__main__")


@pytest.fixture(autouse=True)
def server(app, monkeypatch):
    """Receives the options of the server, which is not started."""
    server = unittest.mock.Mock()
    monkeypatch.setattr(serve, "Granian", server)
    monkeypatch.setattr(flask.Flask, "run", server)
    monkeypatch.setattr(serve.multiprocessing, "set_start_method", lambda _: None)
    monkeypatch.setenv("PORT", str(free_port()))
    return server


@pytest.fixture
def refusal(monkeypatch):
    """A function that returns the line that rejects settings at startup."""

    def run(start=serve.main, **settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        try:
            start()
        except SystemExit as stopped:
            line = stopped.code
        else:
            pytest.fail(f"startup must reject {settings}")
        assert isinstance(line, str) and len(line.splitlines()) == 1, f"not one line: {line!r}"
        assert "s3" not in line, f"a part of a secret is shown: {line}"
        return line

    return run


# Python does not close the socket that it has made for an impossible HOST.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "allowed", "values"),
    [
        ("PORT", "from 1 to 65535", ["0", "65536", "http", "-1", " 80", "8_0", "²", "9" * 5000]),
        ("WEB_CONCURRENCY", "from 1 to 16", ["0", "17", "auto"]),
        ("ACCESS_LOG", "from 0 to 1", ["2", "yes"]),
        ("REDIS_PORT", "from 1 to 65535", ["0", "65536", "tcp://10.0.0.1:6379"]),
        ("REDIS_DB", "from 0 to 2147483647", ["-1", "2147483648"]),
        ("HOST", "an address of this machine", ["192.0.2.1", "a..b", "\udcff"]),
    ],
)
def test_bad_value_is_rejected_and_named(refusal, name, allowed, values):
    for value in values:
        line = refusal(**{"REDIS_HOST": "redis", name: value})
        assert line.startswith(name) and allowed in line and f"got {value!r}" in line, line


@pytest.mark.parametrize("start", [serve.main, run_app])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("REDIS_HOST", ["10.0.0.5:6379", "s3cret:6379", "redis://s3cret", "fe80:s3cret"]),
        ("REDIS_URL", ["s3cret", "http://s3cret", "redis://default:s3cret", "redis://[s3cret"]),
        ("REDIS_URL", ["redis://:s3/cret@r", "redis://r?db=s3cret", "redis://r?s3cret=1"]),
    ],
)
def test_bad_redis_address_is_rejected_and_hidden(refusal, start, name, values):
    for value in values:
        line = refusal(start, **{name: value})
        assert line.startswith(f"{name} must be ") and value not in line, line


@pytest.mark.parametrize("content", [None, b"", b"\n", b"s3cret\nword\n", b"\ns3cret", b"s3\xff"])
def test_password_file_without_one_line_is_rejected(refusal, tmp_path, content):
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    line = refusal(REDIS_HOST="redis", REDIS_PASSWORD_FILE=str(path))
    assert line.startswith("REDIS_PASSWORD_FILE must be a file with one line"), line
    assert f"got {str(path)!r}" in line, line


def test_taken_port_is_rejected(refusal):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(PORT=str(port), HOST="localhost")
    assert f"a free port, got 'localhost' and {port}" in line


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_server_listens_on_ipv6(server, monkeypatch):
    monkeypatch.setenv("HOST", "::")
    serve.main()
    assert server.call_args.kwargs["address"] == "::"


def test_development_server_is_local_by_default(server):
    run_app()
    server.assert_called_once_with(host="127.0.0.1", port=int(os.environ["PORT"]))


def test_server_limits_suit_proxies_and_docker(server):
    """Load balancers keep an idle connection for 60 s. Docker kills a container after 10 s."""
    serve.main()
    options = server.call_args.kwargs
    kept_seconds = options["http1_settings"].header_read_timeout / 1000
    assert 60 < kept_seconds <= 120, f"an idle connection is closed after {kept_seconds} s"
    seconds = options["workers_kill_timeout"]
    assert seconds <= 5, f"an unfinished request delays the stop by {seconds} s"
    connections = options["backpressure"]
    assert connections > limits.IDLE_CONNECTIONS, f"a worker accepts {connections} connections"


def test_name_lookup_limit_is_set_at_import():
    """glibc reads RES_OPTIONS at the first lookup. Options of the user override ours."""
    program = "import app, os; print(os.environ['RES_OPTIONS'])"
    environment = {**os.environ, "PYTHONPATH": str(CONTEXT), "RES_OPTIONS": "ndots:1 timeout:3"}
    options = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert options == "timeout:1 attempts:1 ndots:1 timeout:3\n"
