"""A hit counter on Redis: the routes, how they call Redis, the client, the settings.

`python app.py` runs it in Flask's development server. In production, serve.py starts it.
"""

import ipaddress
import math
import os
import re
import socket
import sys
import threading
import time

from flask import Flask, request
from werkzeug.exceptions import HTTPException

try:
    import redis
except ImportError:  # an error only if a Redis is configured, see get_redis_client
    redis = None

app = Flask(__name__, static_folder=None)
# serve.py imports this file once and then forks its workers. All have this time, so they report the
# same uptime. Each has its own breaker, and its own copy of the client, which connects later.
start_time = time.monotonic()

# --- Routes


@app.get("/")
def index():
    """Count one hit and return its number. Flask also calls this for HEAD, which is not a hit."""
    hit_count, redis_error = None, None
    if request.method == "GET":
        hit_count, redis_error = call_redis(add_hits, 1)
    return {
        "message": "Hello from lab25",
        "path": request.path,
        "host": request.headers.get("Host"),  # request.host is empty if the name has an underscore
        "env": setting("LAB_ENV", "dev"),
        "hit_count": hit_count,
        "redis_error": redis_error,
    }


@app.get("/health")
def health():
    """Return status 200 while this process can serve, with or without Redis."""
    # Adding 0 is a write, so it fails whenever a hit would fail. A PING does not: a Redis that
    # accepts no writes, because its disk is full, still answers it.
    hit_count, _ = call_redis(add_hits, 0)
    return {
        "status": "ok",
        "uptime_seconds": int(time.monotonic() - start_time),
        "hostname": socket.gethostname(),
        "env": setting("LAB_ENV", "dev"),
        "redis_ok": hit_count is not None,
        "version": setting("BUILD_VERSION", "dev"),
        "build_date": setting("BUILD_DATE", "unknown"),
    }


@app.after_request
def forbid_caching(response):
    """Forbid caches to store an answer, or they could give one number to two visitors."""
    response.headers["Cache-Control"] = "no-store"
    return response


@app.errorhandler(HTTPException)
def error_as_json(error):
    """Return an HTTP error as JSON.

    If a route raises another exception, Flask logs the traceback and calls this with a 500.
    """
    headers = dict(error.get_headers())  # for example Allow, if the status is 405
    headers.pop("Content-Type", None)  # it is text/html, and Flask sets another one for JSON
    return {"error": error.description}, error.code, headers


# --- How the routes call Redis


def add_hits(client, amount):
    """Add to the counter and return the new count. Raise RedisError if the reply is no number."""
    count = client.incr("lab25_hits", amount)
    if not isinstance(count, int):  # a server that is not Redis may reply with a text
        raise redis.RedisError(f"the count must be a number, got {count!r}; is this Redis?")
    return count


def call_redis(operation, *arguments):
    """Return (operation(client, *arguments), None), or (None, reason) if Redis fails.

    Return (None, None) if no Redis is configured. An exception that comes neither from Redis nor
    from the network is a bug in the operation: it is raised, and only this request gets a 500.
    """
    try:
        client = get_redis_client()
    except ValueError as error:  # a bad setting, under a server that does not check it at startup
        return None, describe(error)
    if client is None:
        return None, None
    return breaker.call(client, operation, *arguments)


class CircuitBreaker:
    """Spares requests the wait for a Redis that fails.

    While it is closed, every call runs its operation. A failure opens it. While it is open, calls
    return the reason of the last failure at once, except for the trial: a second after the last
    failure, the next call runs its operation. If it succeeds, the breaker closes.

    An operation may be so slow that it ends after such a change. If it fails then, it opens the
    breaker although Redis works, until the next trial. If it succeeds, it closes the breaker
    although Redis fails, until the next failure.
    """

    def __init__(self):
        self._lock = threading.Lock()  # held to read or change the following
        self._reason = None  # why the breaker is open; None while it is closed
        self._next_trial = 0.0  # not before this time.monotonic()

    def call(self, client, operation, *arguments):
        """Return (operation(client, *arguments), None), or (None, reason) while Redis fails."""
        with self._lock:
            if self._reason is not None:
                if time.monotonic() < self._next_trial:
                    return None, self._reason
                self._next_trial = math.inf  # this call is the trial; none starts before it ends
        try:
            result = operation(client, *arguments)
        except (redis.RedisError, OSError, UnicodeError) as error:
            # OSError comes from the network, UnicodeError from an impossible host name like a..b.
            reason = describe(error)
            self._open(reason)
            close_idle_connections(client)
            return None, reason
        except BaseException:  # a bug in the operation, so the next call can be a trial
            with self._lock:
                self._next_trial = 0.0
            raise
        self._close()
        return result, None

    def _open(self, reason):
        with self._lock:
            was_closed = self._reason is None
            self._reason = reason
            self._next_trial = time.monotonic() + 1
        if was_closed:  # logged after the lock is released, because a log can be slow
            app.logger.warning("Redis failed, hits are not counted: %s", reason)

    def _close(self):
        with self._lock:
            was_open = self._reason is not None
            self._reason = None
        if was_open:
            app.logger.warning("Redis is back, hits are counted again")


breaker = CircuitBreaker()


def close_idle_connections(client):
    """Close the connections that wait for their next use.

    The name of Redis may have a new address, and only a new connection looks it up. Connections in
    use stay open, since other operations wait for their replies.
    """
    if hasattr(client, "connection_pool"):  # a test may use a client without one
        client.connection_pool.disconnect(inuse_connections=False)


# --- The Redis client

# The limit of each step of an operation. At worst, an operation takes all of these:
#     1.0 s  to look up the name of Redis (limit_name_lookup sets this limit)
#     0.5 s  to connect
#     1.0 s  for TLS and CLIENT SETINFO, if there is a REDIS_URL
#     0.5 s  to log in with a password
#     0.5 s  to select a database other than 0
#     0.5 s  for the reply to the operation
#     4.0 s  in all, or more if several name servers or addresses of Redis are tried
# If Redis is frozen, an operation takes 0.5 s: the system still connects, but no reply comes.
STEP_SECONDS = 0.5

_redis_client = None  # created when it is first needed
_redis_password = None  # the password of this client, for describe to remove it from messages


def get_redis_client():
    """Return the Redis client, or None if no Redis is configured. It connects when it is used.

    Raise ValueError if a setting cannot be used, or if the package redis is not installed.
    """
    global _redis_client
    if _redis_client is None and (setting("REDIS_URL") or setting("REDIS_HOST")):
        if redis is None:
            raise ValueError("Redis is configured, but the package redis is not installed")
        _redis_client = create_redis_client()
    return _redis_client


def create_redis_client():
    """Return a client for REDIS_URL, or else for REDIS_HOST. Raise ValueError for a bad setting."""
    global _redis_password
    options = {
        "password": read_redis_password(),
        "socket_connect_timeout": STEP_SECONDS,
        "socket_timeout": STEP_SECONDS,
        # No retry: a hit that got no reply may have been counted, and would be counted twice.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        "protocol": 2,  # saves a step of each new connection: HELLO
    }
    if setting("REDIS_URL"):
        client = client_for_url(setting("REDIS_URL"), options)
        # The URL may have a password of its own.
        _redis_password = client.get_connection_kwargs().get("password")
    else:
        client = client_for_host(setting("REDIS_HOST"), options)
        _redis_password = options["password"]
    return client


def client_for_url(url, options):
    """Return a client for this URL. Options in the URL override ours. Raise ValueError."""
    try:
        client = redis.Redis.from_url(url, **options)
        # redis-py checks some options only when it creates a connection. This one is never opened.
        client.connection_pool.connection_class(**client.get_connection_kwargs())
    except Exception:  # its message is not shown, because it may contain the password
        raise ValueError(
            "REDIS_URL must be an address that redis-py can use, such as"
            " redis://USER:PASSWORD@HOST:6379/0, rediss://… (TLS) or unix:///PATH"
        ) from None
    return client


def client_for_host(host, options):
    """Return a client for this host, REDIS_PORT and REDIS_DB. Raise ValueError."""
    if ":" in host and not is_ipv6_address(host):
        # The value is not shown: it may be a URL, with a password.
        raise ValueError("REDIS_HOST must be a host name or an IP address, without a port")
    port = whole_number("REDIS_PORT", 6379, 1, 65535)
    db = whole_number("REDIS_DB", 0, 0, 2**31 - 1)
    # driver_info=None saves another step: CLIENT SETINFO. client_for_url does not save it, because
    # redis-py 8.1 drops a new TLS connection that has had no such step.
    return redis.Redis(host=host, port=port, db=db, driver_info=None, **options)


def is_ipv6_address(text):
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def limit_name_lookup():
    """Limit the wait for each name server to 1 s. Call this before the first look-up."""
    # glibc reads RES_OPTIONS. Its default is two attempts of 5 s each. Options that are set already
    # come last, and override ours.
    user_options = setting("RES_OPTIONS", "")
    os.environ["RES_OPTIONS"] = f"timeout:1 attempts:1 {user_options}"


def describe(error):
    """Return an exception as one line of at most 200 characters, without the password."""
    # A server that does not know the command AUTH quotes it, with the password or the start of it.
    text = str(error).partition(", with args beginning with")[0]
    if _redis_password:
        text = text.replace(_redis_password, "***")
    words = f"{type(error).__name__}: {text}".split()
    return " ".join(words)[:200]


# --- Settings: environment variables. An empty one counts as unset.


def setting(name, default=None):
    """Return the environment variable, or the default if it is unset or empty."""
    return os.environ.get(name) or default


def whole_number(name, default, lowest, highest):
    """Return a setting as an integer. Raise ValueError if it is not one in this range."""
    text = setting(name, str(default))
    # int() alone would also accept " 80" and "8_0".
    if re.fullmatch("[0-9]{1,10}", text) and lowest <= int(text) <= highest:
        return int(text)
    raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, got {text!r}")


def read_redis_password():
    """Return the password for Redis, or None. Raise ValueError if its file cannot be used."""
    path = setting("REDIS_PASSWORD_FILE")
    if path is None:
        return setting("REDIS_PASSWORD")
    requirement = "REDIS_PASSWORD_FILE must be a file with one line, the password"
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{requirement}, got {path!r} ({type(error).__name__})") from None
    if len(lines) != 1 or not lines[0]:
        raise ValueError(f"{requirement}, got {path!r}, which is empty or has more lines")
    return lines[0]


if __name__ == "__main__":
    limit_name_lookup()
    try:
        get_redis_client()
        port = whole_number("PORT", 8080, 1, 65535)
    except ValueError as error:
        sys.exit(str(error))
    app.run(host=setting("HOST", "127.0.0.1"), port=port)
