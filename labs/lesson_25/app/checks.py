"""The checks that the start makes: where Redis is, and where to listen.

A check raises ValueError, with a sentence for the user. None of them connects to Redis.
"""

import ipaddress
import re
import socket
import ssl
import urllib.parse

import app
from app import MAX_DB, bad_url, setting

# --- Where Redis is. No error message shows a part of REDIS_HOST or REDIS_URL, because any part of
# --- a wrong one may be a password.


def check_redis():
    """Return where Redis is, in words for the log.

    Raises ValueError where a setting of Redis cannot be used. With REDIS_URL, or without any Redis,
    REDIS_PORT and REDIS_DB are not read: Kubernetes may have set a REDIS_PORT of its own.
    """
    refuse_both("REDIS_HOST", "REDIS_URL")
    refuse_both("REDIS_PASSWORD", "REDIS_PASSWORD_FILE")
    if not app.redis_is_configured():
        return "none, no counter"
    if app.redis is None:
        return "none, no counter (the Python package redis is not installed)"

    url = setting("REDIS_URL")
    if url:
        check_redis_url(url)
    else:
        check_redis_host(setting("REDIS_HOST"))

    # This makes the client that the service will use. Making it reads REDIS_PORT, REDIS_DB and the
    # password file, and raises ValueError where one of them cannot be used.
    client = app.get_redis_client()
    connection = new_connection(client)
    check_database(connection.db)
    if isinstance(connection, app.redis.SSLConnection):
        check_tls_files(connection)
    if isinstance(connection, app.redis.UnixDomainSocketConnection):
        return connection.path
    return f"{host_and_port(connection.host, connection.port)}/{connection.db}"


def host_and_port(host, port):
    """Return HOST:PORT as an address has it: an IPv6 host stands in brackets."""
    if ":" in host:
        return f"[{host}]:{port}"
    return f"{host}:{port}"


def refuse_both(one, other):
    """Raise ValueError where both settings are set."""
    if setting(one) and setting(other):
        raise ValueError(f"{one} and {other} are both set: unset one of them")


def check_redis_host(host):
    """Raise ValueError where REDIS_HOST cannot be used."""
    problem = problem_of_host(host)
    if problem:
        raise ValueError(
            f"REDIS_HOST cannot be used: {problem}. It must be a host name or an IP address;"
            " a port belongs in REDIS_PORT, a user or a password in REDIS_URL"
        )


def problem_of_host(host):
    """Return what is wrong with a host, or None."""
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return "it has a colon and is no IPv6 address"
        return None
    if not re.fullmatch(r"[\w.-]+", host):
        return "it has characters that no host name has"
    try:
        host.encode("idna")  # as the look-up of the name does
    except UnicodeError:
        return "a part between two dots is empty, or longer than 63 characters"
    return None


# --- REDIS_URL. redis-py takes many wrong addresses. Some of them fail only at the first hit,
# --- others lead to another Redis or another database than was meant. These are refused here.

# An address may have these options after its ?. Others could set a time limit of their own.
TLS_OPTIONS = {
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
}
URL_OPTIONS = TLS_OPTIONS | {"db", "username", "password"}


def check_redis_url(url):
    """Raise ValueError where the text of REDIS_URL is wrong."""
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise bad_url("it begins with none of redis://, rediss:// and unix://")
    if "#" in url:
        raise bad_url("it has a #, which must be written %23")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port  # raises ValueError where it is no number, or above 65535
    except ValueError:
        # Most often a password is to blame: in redis://:my/password@host, "my" looks like the port.
        raise bad_url(
            "its port cannot be read"
            " (in a password, write / as %2F, ? as %3F, @ as %40, [ as %5B and ] as %5D)"
        ) from None
    names_and_values = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    options = dict(names_and_values)
    if len(options) < len(names_and_values):
        raise bad_url("it has an option twice")
    check_options(options, parts.scheme)
    if parts.scheme == "unix":
        check_socket(parts.hostname, parts.path)
    else:
        check_place(parts.hostname, port)
        check_database_in_path(parts.path, options)
    has_password = parts.password or "password" in options
    if has_password and (setting("REDIS_PASSWORD") or setting("REDIS_PASSWORD_FILE")):
        raise bad_url("it has a password, and another one is set: unset one of them")


def check_socket(host, path):
    """Raise ValueError where these parts of a unix:// address are wrong."""
    if host:
        raise bad_url("it must have three slashes before the path of its socket: unix:///PATH")
    if not path:
        raise bad_url("it names no socket")


def check_place(host, port):
    """Raise ValueError where the host or the port of a redis:// or rediss:// address is wrong."""
    if not host:
        raise bad_url("it names no host")
    problem = problem_of_host(urllib.parse.unquote(host))  # redis-py unquotes it, too
    if problem:
        raise bad_url(f"its host cannot be right: {problem}")
    if port == 0:
        raise bad_url("its port is not from 1 to 65535")


def check_database_in_path(path, options):
    """Raise ValueError where an address does not name one database, after its host or as `db`."""
    if not re.fullmatch("/?[0-9]*", path):
        raise bad_url("what follows its host is not the number of a database")
    if path.strip("/") and "db" in options:
        raise bad_url("it names a database twice")


def check_options(options, scheme):
    """Raise ValueError where an address has an option that is not allowed, or is empty."""
    for name, value in options.items():
        if name not in URL_OPTIONS:
            raise bad_url(f"it has an option that is none of {', '.join(sorted(URL_OPTIONS))}")
        if not value:
            raise bad_url("it has an option without a value")
        if name in TLS_OPTIONS and scheme != "rediss":
            raise bad_url("it has an option for TLS, which needs rediss://")


def new_connection(client):
    """Return a new connection of this client. It is not open yet, but knows its address.

    Raises ValueError where redis-py does not take an option. Only REDIS_URL can have a wrong one.
    """
    pool = client.connection_pool
    try:
        return pool.connection_class(**pool.connection_kwargs)
    except Exception:  # redis-py raises several kinds of errors, and some of them show the value
        raise bad_url("an option has a wrong value") from None


def check_database(db):
    """Raise ValueError where Redis cannot have a database of this number."""
    if not 0 <= db <= MAX_DB:  # that of REDIS_DB has been checked already
        raise bad_url(f"its database is not from 0 to {MAX_DB}")


def check_tls_files(connection):
    """Raise ValueError where a file that a connection for TLS names cannot be used."""
    try:
        context = ssl.create_default_context(cafile=connection.ca_certs)
        if connection.certfile or connection.keyfile:
            # There is no setting for the password of an encrypted key. With "" such a key is
            # refused. With None, the default, OpenSSL would ask for its password at the terminal.
            context.load_cert_chain(connection.certfile, connection.keyfile, password="")
    except (OSError, TypeError):  # TypeError: a key without a certificate
        raise bad_url(
            "a file that it names cannot be read, or holds no certificate or no key"
        ) from None


# --- Where to listen


def check_address(host, port):
    """Return the IP address to listen on. Raises ValueError where that is not possible.

    granian needs an IP address, and would share a port that another program uses. So the host name
    is looked up here, and the port is tried: this process listens on it for a moment.
    """
    options = {}
    if ":" in host:
        options = {"family": socket.AF_INET6, "dualstack_ipv6": True}  # as granian will listen
    try:
        with socket.create_server((host, port), **options) as listener:
            return listener.getsockname()[0]
    # OSError: no such host, or a port that is in use. TypeError and ValueError: a host with
    # characters that cannot be sent to a name server.
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"HOST is {host!r} and PORT is {port}: {error};"
            " set an address and a free port of this machine"
        ) from None
