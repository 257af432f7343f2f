"""A hit counter on Redis: the routes, how they call Redis, the client, the settings.

`python app.py` runs it in Flask's development server. In production, serve.py starts it.
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
except ImportError:  # get_redis_client reports it, if a Redis is configured
    redis = None

app = Flask(__name__, static_folder=None)
# serve.py imports this file and creates the Redis client in one process, then forks the workers.
# So all workers have the same start time, but each has connections and a breaker of its own.
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
        "host": request.headers.get("Host"),  # request.host is empty for a name like lab25_web
        "env": setting("LAB_ENV", "dev"),
        "hit_count": hit_count,
        "redis_error": redis_error,
    }


@app.get("/health")
def health():
    """Return status 200 while this process can serve, with or without Redis."""
    # Redis refuses to add 0 whenever it refuses a hit. It may still answer a PING, for example if
    # its disk is full.
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

    If a route raises another exception, Flask logs the traceback and calls this with a 500.
    """
    headers = dict(error.get_headers())
    del headers["Content-Type"]  # that of an HTML page
    return {"error": error.description}, error.code, headers


# --- How the routes call Redis


def add_hits(client, amount):
    """Add to the counter and return the new count. Raise RedisError if there is none."""
    count = client.incr("lab25_hits", amount)
    if not isinstance(count, int):  # a server that is not Redis may reply with a text
        raise redis.RedisError(f"the count must be a number, got {count!r}; is this Redis?")
    return count


def call_redis(operation, *arguments):
    """Return (operation(client, *arguments), None), or (None, reason) if Redis fails.

    Return (None, None) if no Redis is configured. An exception that does not come from Redis is a
    bug in the operation: it is raised, and this request gets a 500.
    """
    try:
        client = get_redis_client()
    except ValueError as error:  # serve.py has ruled this out at startup, other servers have not
        return None, describe(error)
    if client is None:
        return None, None
    return breaker.call(client, operation, *arguments)


class CircuitBreaker:
    """Spares requests the wait for a Redis that fails.

    While the breaker is closed, every call runs its operation. A failure opens it. While it is
    open, calls return the reason at once. Only one call a second runs its operation, as a trial. If
    that succeeds, the breaker closes.

    An operation that started before such a change may end after it. If it fails then, it opens the
    breaker although Redis works, until the next trial. If it succeeds, it closes the breaker
    although Redis fails, until the next failure.
    """

    def __init__(self):
        self._lock = threading.Lock()  # held to read or change the following
        self._reason = None  # why the breaker is open; None while it is closed
        self._next_trial = 0.0  # not before this time.monotonic()
        self._trial_is_running = False

    def call(self, client, operation, *arguments):
        """Return (operation(client, *arguments), None), or (None, reason) while Redis fails."""
        with self._lock:
            is_trial = self._reason is not None
            if is_trial:
                if self._trial_is_running or time.monotonic() < self._next_trial:
                    return None, self._reason
                self._trial_is_running = True
        try:
            result = operation(client, *arguments)
            self._set_reason(None)
            return result, None
        # The system raises OSError, and the look-up of an impossible name (a..b) UnicodeError.
        except (redis.RedisError, OSError, UnicodeError) as error:
            reason = describe(error)
            self._set_reason(reason)
            # The name of Redis may have a new address: the next operation has to connect again.
            if hasattr(client, "connection_pool"):  # a test may use a simpler client
                client.connection_pool.disconnect(inuse_connections=False)
            return None, reason
        finally:  # even after a bug in the operation, or no trial would ever follow
            if is_trial:
                self._trial_is_running = False

    def _set_reason(self, reason):
        with self._lock:
            previous = self._reason
            self._reason = reason
            self._next_trial = time.monotonic() + 1
        # The log is written after the lock is released, because it can be slow.
        if reason and not previous:
            app.logger.warning("Redis failed, hits are not counted: %s", reason)
        if previous and not reason:
            app.logger.warning("Redis is back, hits are counted again")


breaker = CircuitBreaker()


# --- The Redis client

# The limit of each step of an operation. One operation takes at most:
#     1.0 s  to look up the name of Redis (see limit_name_lookup)
#     0.5 s  to connect
#     0.5 s  for TLS
#     0.5 s  to log in with a password
#     0.5 s  to select a database other than 0
#     0.5 s  for the reply to the operation
#     3.5 s  in all, and more if the name has several servers or addresses
# A frozen Redis takes 0.5 s: it still accepts connections, but sends no reply.
STEP_SECONDS = 0.5

_redis_client = None  # created when it is first needed
_redis_password = None  # what describe must hide


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
    """Return a client for REDIS_URL, or else REDIS_HOST. Raise ValueError for a bad setting."""
    global _redis_password
    _redis_password = redis_password()
    options = {
        "password": _redis_password,
        "socket_connect_timeout": STEP_SECONDS,
        "socket_timeout": STEP_SECONDS,
        # No retry: a hit that got no reply may have been counted, and would be counted twice.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        # Without these, redis-py sends HELLO and CLIENT SETINFO first, which are two more steps.
        "protocol": 2,
        "driver_info": None,
    }
    if not setting("REDIS_URL"):
        host = redis_host()
        port = whole_number("REDIS_PORT", 6379, 1, 65535)
        db = whole_number("REDIS_DB", 0, 0, 2**31 - 1)
        return redis.Redis(host=host, port=port, db=db, **options)
    try:
        # What the URL sets overrides our options.
        client = redis.Redis.from_url(setting("REDIS_URL"), **options)
        url_options = client.get_connection_kwargs()
        # redis-py rejects some options only here. This connection is not opened.
        client.connection_pool.connection_class(**url_options)
    except Exception:  # its message is not shown, because it may contain the password
        raise ValueError(
            "REDIS_URL must be an address that redis-py can use, such as"
            " redis://USER:PASSWORD@HOST:6379/0, rediss://… (TLS) or unix:///PATH"
        ) from None
    _redis_password = url_options.get("password")
    return client


def describe(error):
    """Return an exception as one line of at most 200 characters, without the password."""
    # Redis replies to an unknown command with the start of its arguments, which is the start of the
    # password if the command is AUTH.
    text = str(error).partition(", with args beginning with")[0]
    if _redis_password:
        text = text.replace(_redis_password, "***")
    one_line = " ".join(f"{type(error).__name__}: {text}".split())
    return one_line[:200]


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
    except ValueError:  # the value is not shown, because it may contain a password
        raise ValueError("REDIS_HOST must be a host name or an IP address, no port") from None
    return host


def redis_password():
    """Return the password for Redis, or None. Raise ValueError if its file cannot be used."""
    path = setting("REDIS_PASSWORD_FILE")
    if path is None:
        return setting("REDIS_PASSWORD")
    requirement = "REDIS_PASSWORD_FILE must be a file with one line, the password"
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{requirement}, got {path!r}: {error}") from None
    if len(lines) != 1 or not lines[0]:
        raise ValueError(f"{requirement}, got {path!r} with {len(lines)} lines")
    return lines[0]


def limit_name_lookup():
    """Make the C library give up on a name server after 1 second, instead of 10."""
    user_options = setting("RES_OPTIONS", "")  # last, so that they override ours
    os.environ["RES_OPTIONS"] = f"timeout:1 attempts:1 {user_options}"


if __name__ == "__main__":
    limit_name_lookup()
    try:
        get_redis_client()
        port = whole_number("PORT", 8080, 1, 65535)
    except ValueError as error:
        sys.exit(str(error))
    app.run(host=setting("HOST", "127.0.0.1"), port=port)
