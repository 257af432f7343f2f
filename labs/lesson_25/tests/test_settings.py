"""Settings that stop the start, each with one line; the server itself is not started here."""

import socket
import subprocess

import pytest

import checks
import serve


@pytest.fixture
def refusal(app, monkeypatch):
    """A function that returns the one line with which the start stops."""

    def start(*_, **__):
        pytest.fail("the start did not stop")

    def run(**settings):
        with monkeypatch.context() as only:
            only.setattr(app, "_redis_client", None)
            only.setattr(serve, "Server", start)
            for name, value in settings.items():
                only.setenv(name, value)
            with pytest.raises(SystemExit) as stopped:
                serve.main()
        line = stopped.value.code
        assert isinstance(line, str) and len(line.splitlines()) == 1, f"not one line: {line}"
        return line

    return run


@pytest.fixture
def place(app, monkeypatch):
    """A function that returns where Redis is, as the start's line in the log tells it."""

    def run(**settings):
        with monkeypatch.context() as only:
            only.setattr(app, "_redis_client", None)
            for name, value in settings.items():
                only.setenv(name, value)
            return checks.check_redis()

    return run


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with a certificate and its key, and a file that is neither."""
    folder = tmp_path_factory.mktemp("certificates")
    files = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=redis"]
    subprocess.run([*command, *files], check=True, capture_output=True)
    (folder / "text.pem").write_text("no certificate")
    return folder


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        (
            "PORT",
            ["0", "65536", "http", "-1", "80.0", " 80", "8_0", "²", "9" * 5000],
            "from 1 to 65535",
        ),
        ("WEB_CONCURRENCY", ["0", "17", "auto"], "from 1 to 16"),
        ("ACCESS_LOG", ["2", "yes"], "from 0 to 1"),
        ("REDIS_PASSWORD_FILE", ["/nowhere", "/", "/dev/null"], "a file with the password"),
        ("HOST", ["999.1.1.1", "192.0.2.1", "a..b", "\udcff"], "set an address"),
    ],
)
def test_a_bad_value_stops_the_start_and_is_named_with_what_it_may_be(
    refusal, name, values, allowed
):
    for value in values:
        line = refusal(REDIS_HOST="redis.example", **{name: value})
        assert f"{name} is {value!r}" in line and allowed in line


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("REDIS_PORT", ["0", "65536", "redis", "tcp://10.0.0.1:6379"], "from 1 to 65535"),
        ("REDIS_DB", ["-1", "one", "2147483648"], "from 0 to 2147483647"),
    ],
)
def test_a_bad_number_stops_the_start_where_redis_host_is_set_and_there_alone(
    refusal, place, name, values, allowed
):
    for value in values:
        line = refusal(REDIS_HOST="redis.example", **{name: value})
        assert f"{name} is {value!r}" in line and allowed in line
        assert place(**{name: value}) == "none, no counter"
        assert place(REDIS_URL="redis://r", **{name: value}) == "r:6379/0"


@pytest.mark.parametrize(
    "host",
    [
        "s3cret:6379",
        "default:s3cret",
        ":s3cret@redis",
        "redis://s3cret",
        "s3cret..redis",
        "s3cret" * 11,
        "fe80:s3cret",
        "two s3crets",
    ],
)
def test_a_host_that_cannot_be_stops_the_start_and_is_not_shown(refusal, host):
    line = refusal(REDIS_HOST=host)
    assert line.startswith("REDIS_HOST cannot be used: ")
    assert "It must be a host name or an IP address" in line
    assert "s3cret" not in line


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3cret", "it begins with none of"),
        ("http://s3cret", "it begins with none of"),
        ("redis://", "it names no host"),
        ("redis://:6379", "it names no host"),
        ("redis://:s3cret@/0", "it names no host"),
        ("redis://:12/s3cret@redis:6379", "it names no host"),
        ("redis://default:s3cret", "its port cannot be read"),
        ("redis://:s3/cret@redis:6379", "its port cannot be read"),
        ("redis://:s3cret@redis:6379:1", "its port cannot be read"),
        ("redis://redis:99999", "its port cannot be read"),
        ("redis://[::1", "its port cannot be read"),
        ("redis://redis?db=s3cret", "it is no address, or an option has a wrong value"),
        ("redis://redis:0", "its port is not from 1 to 65535"),
        ("redis://:s3cret#1@host", "it has a #, which must be written %23"),
        ("redis://:12#s3cret@host", "it has a #, which must be written %23"),
        ("redis://s3cret..host", "its host cannot be right"),
        ("redis://two s3crets", "its host cannot be right"),
        ("redis://h/s3cret", "what follows its host is not the number of a database"),
        ("redis://h/1/2", "what follows its host is not the number of a database"),
        ("redis://h/99999999999", "its database is not from 0 to 2147483647"),
        ("redis://h?db=99999999999", "its database is not from 0 to 2147483647"),
        ("redis://h/1?db=1", "it names a database twice"),
        ("redis://h?db=1&db=2", "it has an option twice"),
        ("redis://h?db=-1", "its database is not from 0 to 2147483647"),
        ("unix://", "it names no socket"),
        ("unix://s3cret/redis.sock", "it must have three slashes before the path of its socket"),
        ("redis://:s3cret@h?socket_timeout=9", "it has an option that is none of"),
        ("redis://h?s3cret=1", "it has an option that is none of"),
        ("rediss://h?ssl_nonsense=1", "it has an option that is none of"),
        ("redis://h?db=", "it has an option without a value"),
        ("redis://h?ssl_cert_reqs=none", "it has an option for TLS, which needs rediss://"),
        ("rediss://h?ssl_cert_reqs=s3cret", "an option has a wrong value"),
        ("rediss://h?ssl_ca_certs=/s3cret", "a file that it names cannot be read"),
        ("rediss://h?ssl_keyfile=/s3cret", "a file that it names cannot be read"),
    ],
)
def test_an_address_that_cannot_be_stops_the_start_and_is_not_shown(refusal, url, problem):
    line = refusal(REDIS_URL=url)
    assert line.startswith(f"REDIS_URL cannot be used: {problem}"), line
    assert "It must look like redis://USER:PASSWORD@HOST:6379/0" in line
    assert "s3" not in line


def test_a_password_file_that_cannot_be_read_is_what_is_named(refusal):
    line = refusal(REDIS_URL="redis://redis", REDIS_PASSWORD_FILE="/nowhere")
    assert line.startswith("REDIS_PASSWORD_FILE is '/nowhere'")


@pytest.mark.parametrize(
    ("options", "works"),
    [
        ("ssl_ca_certs={}/certificate.pem", True),
        ("ssl_ca_certs={}/text.pem", False),
        ("ssl_certfile={0}/certificate.pem&ssl_keyfile={0}/key.pem", True),
        ("ssl_certfile={0}/certificate.pem&ssl_keyfile={0}/text.pem", False),
        ("ssl_keyfile={}/key.pem", False),
        ("ssl_check_hostname=no&ssl_cert_reqs=none", True),
    ],
)
def test_files_for_tls_are_read_at_the_start(refusal, place, certificates, options, works):
    url = f"rediss://redis?{options.format(certificates)}"
    if works:
        assert place(REDIS_URL=url) == "redis:6379/0"
    else:
        assert "a file that it names" in refusal(REDIS_URL=url)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({}, "none, no counter"),
        ({"REDIS_HOST": "redis"}, "redis:6379/0"),
        ({"REDIS_HOST": "redis_1.example."}, "redis_1.example.:6379/0"),
        ({"REDIS_HOST": "fe80::1%eth0", "REDIS_DB": "2"}, "[fe80::1%eth0]:6379/2"),
        ({"REDIS_URL": "redis://redis"}, "redis:6379/0"),
        ({"REDIS_URL": "redis://redis/"}, "redis:6379/0"),
        ({"REDIS_URL": "redis://redis/0"}, "redis:6379/0"),
        ({"REDIS_URL": "redis://user:s3cret@redis:1/2"}, "redis:1/2"),
        ({"REDIS_URL": "redis://[::1]:6379/2"}, "[::1]:6379/2"),
        ({"REDIS_URL": "redis://:a%2Fb%40c%3F@redis?db=3"}, "redis:6379/3"),
        ({"REDIS_URL": "unix:///tmp/none.sock"}, "/tmp/none.sock"),
        ({"REDIS_URL": "unix://user:s3cret@/tmp/none.sock?db=1"}, "/tmp/none.sock"),
    ],
)
def test_an_address_that_can_be_is_taken_and_told_without_its_password(place, settings, where):
    assert place(**settings) == where


@pytest.mark.parametrize(
    "settings",
    [
        {"REDIS_HOST": "redis", "REDIS_URL": "redis://:s3cret@redis"},
        {"REDIS_HOST": "redis", "REDIS_PASSWORD": "s3cret", "REDIS_PASSWORD_FILE": "/run/secrets"},
        {"REDIS_URL": "redis://:s3cret@redis", "REDIS_PASSWORD": "s3cret too"},
    ],
)
def test_two_addresses_or_two_passwords_stop_the_start(refusal, settings):
    line = refusal(**settings)
    assert "unset one of them" in line and "s3cret" not in line


@pytest.mark.parametrize("settings", [{"REDIS_HOST": "redis"}, {"REDIS_URL": "redis://redis"}])
def test_the_start_says_that_the_package_is_missing(app, place, monkeypatch, settings):
    monkeypatch.setattr(app, "redis", None)
    said = "none, no counter (the Python package redis is not installed)"
    assert place(**settings) == said


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_stops_the_start(refusal, host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        line = refusal(PORT=str(port), HOST=host)
    assert f"PORT is {port}" in line and "set an address and a free port" in line
