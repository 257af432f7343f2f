"""A hit counter on Redis: the routes, how they call Redis, the client, the settings.

`python app.py` runs it in Flask's development server. In production serve.py starts it.
"""

import ipaddress
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
except ImportError:
    redis = None

app = Flask(__name__, static_folder=None)
# Worker processes are forks of the one that imports this file, so all report the same uptime.
start_time = time.monotonic()

# --- Routes


@app.get("/")
def index():
    """Count one hit and return its number. A HEAD request gets here too, and is not a hit."""
    hit_count, redis_error = None, None
    if request.method == "GET":
        hit_count, redis_error = call_redis(add_hits, 1)
    return {
        "message": "Hello from lab25",
        "path": request.path,
        "host": request.headers.get("Host"),  # request.host drops a name with an underscore
        "env": setting("LAB_ENV", "dev"),
        "hit_count": hit_count,
        "redis_error": redis_error,
    }


@app.get("/health")
def health():
    """Return status 200 while this process can serve, with or without Redis."""
    # Adding 0 fails whenever a hit fails. A PING can succeed although Redis accepts no hits.
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
    """Keep a cache on the way from giving one number to two visitors."""
    response.headers["Cache-Control"] = "no-store"
    return response


@app.errorhandler(HTTPException)
def error_as_json(error):
    """Return an error as JSON, with its status and its headers (405 has Allow).

    After an exception in a route, Flask logs the traceback and calls this with a plain 500.
    """
    headers = [(name, value) for name, value in error.get_headers() if name != "Content-Type"]
    return {"error": error.description}, error.code, headers


# --- How the routes call Redis


def add_hits(client, amount):
    """Add this many hits to the counter and return it. Raise RedisError if it is not a number."""
    count = client.incr("lab25_hits", amount)
    if not isinstance(count, int):  # a server that is not Redis may reply with a text
        raise redis.RedisError(f"the counter must be a number, got {count!r}; is this Redis?")
    return count


def call_redis(operation, *arguments):
    """Return (operation(client, *arguments), None), or (None, reason) if Redis fails.

    Return (None, None) if no Redis is configured. Any other exception of the operation is a bug: it
    is raised, and makes this one request a 500.
    """
    try:
        client = get_redis_client()
    except ValueError as error:  # only if nothing checked the settings at startup
        return None, describe(error)
    if client is None:
        return None, None
    return breaker.call(client, operation, *arguments)


class CircuitBreaker:
    """Spares requests the wait for a Redis that fails.

    Closed, it runs every operation. A failure opens it. Open, it returns the reason at once, except
    that once a second one call runs its operation: the trial. A success closes it.

    An operation may end late, when the breaker has changed. If it fails, it opens the breaker again
    although Redis works, until the next trial. If it succeeds, it closes the breaker although Redis
    fails, until the next failure.
    """

    def __init__(self):
        self._reason = None  # why it is open; None while it is closed
        self._next_trial = 0.0  # in seconds of time.monotonic()
        self._state_lock = threading.Lock()  # held while these two change
        self._trial_lock = threading.Lock()  # held while a trial runs, so there is only one

    def call(self, client, operation, *arguments):
        """Return (operation(client, *arguments), None), or (None, reason) while Redis fails."""
        reason = self._reason  # read once, because other threads change it
        if reason is None:
            return self._run(client, operation, *arguments)
        if not self._trial_lock.acquire(blocking=False):
            return None, reason
        try:
            if time.monotonic() < self._next_trial:
                return None, reason
            return self._run(client, operation, *arguments)
        finally:
            self._trial_lock.release()

    def _run(self, client, operation, *arguments):
        try:
            result = operation(client, *arguments)
        except (redis.RedisError, OSError, UnicodeError) as error:  # Unicode: an impossible host
            reason = describe(error)
            self._set_reason(reason)
            # The name of Redis may have a new address. Only a new connection looks it up.
            if hasattr(client, "connection_pool"):  # not every client that a test puts here has it
                client.connection_pool.disconnect(inuse_connections=False)
            return None, reason
        self._set_reason(None)
        return result, None

    def _set_reason(self, reason):
        with self._state_lock:
            previous = self._reason
            self._reason = reason
            self._next_trial = time.monotonic() + 1
        # Without the lock, or a log that is stuck would stop all requests.
        if reason and not previous:
            app.logger.warning("Redis failed, hits are not counted: %s", reason)
        if previous and not reason:
            app.logger.warning("Redis is back, hits are counted again")


breaker = CircuitBreaker()


def describe(error):
    """Return an exception as one line of at most 200 characters, without the password."""
    # Redis quotes a command that it does not know. After AUTH, that is a part of the password.
    text = str(error).partition(", with args beginning with")[0]
    if _redis_password:
        text = text.replace(_redis_password, "***")
    one_line = " ".join(f"{type(error).__name__}: {text}".split())
    return one_line[:200]


# --- The Redis client

# The limit of each step of an operation. All of them together take, at worst:
#
#     1.0 s  to look up the name of Redis (see limit_name_lookup)
#     2.0 s  to connect, and for TLS, a password and a database other than 0
#     0.5 s  for the reply
#
# A second name server, or address of the name, adds its own. A frozen Redis costs the first reply
# only: it still accepts connections.
STEP_SECONDS = 0.5

_redis_client = None  # created when it is first needed
_redis_password = None  # its password, which no message may show


def get_redis_client():
    """Return the client of this process, or None if no Redis is configured. It connects later.

    Raise ValueError if a setting cannot be used, or if the package redis is missing.
    """
    global _redis_client
    if _redis_client is None and (setting("REDIS_URL") or setting("REDIS_HOST")):
        if redis is None:
            raise ValueError("REDIS_HOST or REDIS_URL is set, but the package redis is missing")
        _redis_client = create_redis_client()
    return _redis_client


def create_redis_client():
    """Return a client for REDIS_URL or REDIS_HOST. Raise ValueError if a setting is bad."""
    global _redis_password
    _redis_password = redis_password()
    options = {
        "password": _redis_password,
        "socket_connect_timeout": STEP_SECONDS,
        "socket_timeout": STEP_SECONDS,
        # No retry: a hit that got no reply may have been counted, and would be counted twice.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        # Without these two, a new connection starts with two more steps.
        "protocol": 2,
        "driver_info": None,
    }
    if not setting("REDIS_URL"):
        host = redis_host()
        port = whole_number("REDIS_PORT", 6379, 1, 65535)
        db = whole_number("REDIS_DB", 0, 0, 2**31 - 1)
        return redis.Redis(host=host, port=port, db=db, **options)
    try:
        client = redis.Redis.from_url(setting("REDIS_URL"), **options)
        # redis-py checks some options only when it creates a connection. This one stays closed.
        client.connection_pool.connection_class(**client.get_connection_kwargs())
    except Exception:  # its message is not shown: it may contain a part of the password
        raise ValueError(
            "REDIS_URL must be an address that redis-py can use, such as"
            " redis://USER:PASSWORD@HOST:6379/0, rediss://… (TLS) or unix:///PATH"
        ) from None
    _redis_password = client.get_connection_kwargs().get("password")
    return client


# --- Settings: environment variables. An empty one counts as unset.


def setting(name, default=None):
    """Return the environment variable, or the default if it is unset or empty."""
    return os.environ.get(name) or default


def whole_number(name, default, lowest, highest):
    """Return a setting as an integer. Raise ValueError if it is not one in this range."""
    text = setting(name, str(default))
    if re.fullmatch("[0-9]{1,10}", text) and lowest <= int(text) <= highest:
        return int(text)
    raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, got {text!r}")


def redis_host():
    """Return REDIS_HOST. Raise ValueError if it has a colon and is not an IPv6 address."""
    host = setting("REDIS_HOST")
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
    except ValueError:  # the value is not shown: it may contain a password
        raise ValueError(
            "REDIS_HOST must be a host name or an IP address;"
            " a port belongs in REDIS_PORT, a user or a password in REDIS_URL"
        ) from None
    return host


def redis_password():
    """Return the password for Redis, or None. Raise ValueError if its file cannot be used."""
    path = setting("REDIS_PASSWORD_FILE")
    if path is None:
        return setting("REDIS_PASSWORD")
    problem = f"REDIS_PASSWORD_FILE must be a file with one line, the password, got {path!r}"
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{problem}: {error}") from None
    if len(lines) != 1 or not lines[0]:
        raise ValueError(f"{problem} with {len(lines)} lines")
    return lines[0]


def limit_name_lookup():
    """Have the C library try a name server once, for a second. Its own limit is ten seconds."""
    user_options = setting("RES_OPTIONS", "")  # they come last, so they override ours
    os.environ["RES_OPTIONS"] = f"timeout:1 attempts:1 {user_options}"


if __name__ == "__main__":
    limit_name_lookup()
    try:
        get_redis_client()
        port = whole_number("PORT", 8080, 1, 65535)
    except ValueError as error:
        sys.exit(str(error))
    app.run(host=setting("HOST", "127.0.0.1"), port=port)
