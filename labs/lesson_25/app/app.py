"""A hit counter on Redis: routes, Redis calls, client and settings.

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
except ImportError:  # an error only if Redis is configured; see get_redis_client
    redis = None

app = Flask(__name__, static_folder=None)
# serve.py imports this file once and then forks its workers, so all of them report the same uptime.
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
        "host": request.headers.get("Host"),  # request.host is empty for a name like a_b
        "env": setting("LAB_ENV", "dev"),
        "hit_count": hit_count,
        "redis_error": redis_error,
    }


@app.get("/health")
def health():
    """Return status 200 while this process can serve, with or without Redis."""
    # Adding 0 is a write, so it fails whenever a hit would fail. A PING would not do: a Redis that
    # is a replica, or whose memory is full, answers it but counts no hit.
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
def disable_caching(response):
    """Disable caching, because a cache could give one number to two visitors."""
    response.headers["Cache-Control"] = "no-store"
    return response


@app.errorhandler(HTTPException)
def error_as_json(error):
    """Return an HTTP error as JSON. Flask turns any other exception into InternalServerError."""
    response = error.get_response()  # with the error's own headers, such as Allow
    response.data = app.json.dumps({"error": error.description})
    response.content_type = "application/json"
    return response


# --- Redis calls


def add_hits(client, amount):
    """Add to the counter and return its value. Raise RedisError if the reply is not a number."""
    count = client.incr("lab25_hits", amount)
    if not isinstance(count, int):  # a server that is not Redis can reply with text
        raise redis.RedisError(f"the count must be a number, got {count!r}; is this Redis?")
    return count


def call_redis(operation, *arguments):
    """Return (result, None), (None, reason) if Redis fails, or (None, None) if not configured."""
    try:
        client = get_redis_client()
    except ValueError as error:  # an invalid setting, which serve.py rejects at startup
        return None, describe(error)
    if client is None:
        return None, None
    return breaker.call(client, operation, *arguments)


class CircuitBreaker:
    """Saves requests from waiting while Redis fails.

    While it is closed, every call runs its operation. A failure opens it. While it is open, calls
    return the reason of the failure at once. But one second after the latest failure, a single
    call, the trial, runs its operation. If the trial succeeds, the breaker closes.

    Calls overlap, so one that started during an outage can fail after a trial has succeeded. The
    breaker then opens again, although Redis works, until the next trial.
    """

    def __init__(self):
        self._lock = threading.Lock()  # protects the fields below
        self._reason = None  # why the breaker is open; None while it is closed
        self._next_trial = 0.0  # while it is open: the earliest time.monotonic() of a trial
        self._trial_is_running = False

    def call(self, client, operation, *arguments):
        """Return (operation(client, *arguments), None), or (None, reason) while Redis fails."""
        with self._lock:
            if self._reason is None:
                is_trial = False
            elif self._trial_is_running or time.monotonic() < self._next_trial:
                return None, self._reason
            else:
                is_trial = True
                self._trial_is_running = True
        try:
            result = operation(client, *arguments)
            if is_trial:
                self._close()
            return result, None
        except (redis.RedisError, OSError, UnicodeError) as error:
            # OSError comes from the network, UnicodeError from an invalid host name like a..b. Any
            # other exception is a bug in the operation: only its request gets a 500.
            reason = describe(error)
            self._open(reason)
            # Redis can have a new address, which only a new connection looks up. So close all
            # connections, except those that other calls are using.
            if hasattr(client, "connection_pool"):  # the client of a test can lack one
                client.connection_pool.disconnect(inuse_connections=False)
            return None, reason
        finally:
            # After a bug in the operation, the breaker stays open, and the next call is a trial.
            if is_trial:
                with self._lock:
                    self._trial_is_running = False

    def _open(self, reason):
        with self._lock:
            was_open = self._reason is not None
            self._reason = reason
            self._next_trial = time.monotonic() + 1
        if not was_open:  # logged after the lock is released, because logging can be slow
            app.logger.warning("Redis failed, hits are not counted: %s", reason)

    def _close(self):
        with self._lock:
            self._reason = None
        app.logger.warning("Redis is back, hits are counted again")


breaker = CircuitBreaker()  # each worker has its own

# --- The Redis client

# The limit of each step of an operation. At worst, an operation takes all of these:
#     1.0 s  to look up the name of Redis (RES_OPTIONS below sets this limit)
#     0.5 s  to connect
#     0.5 s  for TLS, if REDIS_URL begins with rediss://
#     0.5 s  to log in with a password
#     1.0 s  for CLIENT SETINFO, which redis-py sends twice
#     0.5 s  to select a database other than 0
#     0.5 s  for the reply to the operation
#     4.5 s  in all, or more if several name servers or addresses of Redis are tried
STEP_SECONDS = 0.5

# Options of glibc's name lookup: one attempt of 1 s for each name server, instead of two of 5 s.
# Options that the user has set come last, so they override ours.
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1 " + os.environ.get("RES_OPTIONS", "")

_redis_client = None  # created when it is first needed, and connects when it is used
_redis_password = None  # its password, which describe removes from messages


def get_redis_client():
    """Return the client, or None if none is configured. Raise ValueError for an invalid setting."""
    global _redis_client, _redis_password
    # Without a lock, because serve.py and `python app.py` call this before they start threads.
    if _redis_client is None and (setting("REDIS_URL") or setting("REDIS_HOST")):
        if redis is None:
            raise ValueError("Redis is configured, but the package redis is not installed")
        _redis_client, _redis_password = create_redis_client()
    return _redis_client


def create_redis_client():
    """Return a client and its password. Raise ValueError for an invalid setting."""
    password = read_redis_password()
    options = {
        "password": password,
        "socket_connect_timeout": STEP_SECONDS,
        "socket_timeout": STEP_SECONDS,
        # No retry: it would count a hit twice if only the reply was lost.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        "protocol": 2,  # version 3 needs one more step to connect
    }
    if setting("REDIS_URL"):
        client = client_for_url(setting("REDIS_URL"), options)
        return client, client.get_connection_kwargs().get("password")  # the URL can have its own
    return client_for_host(setting("REDIS_HOST"), options), password


def client_for_url(url, options):
    """Return a client. The URL's options override ours. Raise ValueError for an invalid URL."""
    try:
        client = redis.Redis.from_url(url, **options)
        # redis-py checks some options only when it creates a connection, so create one, unopened.
        client.connection_pool.connection_class(**client.get_connection_kwargs())
    except Exception:  # its message is not shown, because it can contain the password
        requirement = "an address that redis-py can use, such as redis://USER:PASSWORD@HOST:6379/0"
        raise ValueError(f"REDIS_URL must be {requirement}") from None
    return client


def client_for_host(host, options):
    """Return a client for the host. Raise ValueError if it, REDIS_PORT or REDIS_DB is invalid."""
    if ":" in host:  # allowed only in an IPv6 address
        try:
            ipaddress.IPv6Address(host)
        except ValueError:  # the value is not shown, because it can be a URL with a password
            raise ValueError("REDIS_HOST must be a name or an address, without a port") from None
    port = whole_number("REDIS_PORT", 6379, 1, 65535)
    db = whole_number("REDIS_DB", 0, 0, 2**31 - 1)
    return redis.Redis(host=host, port=port, db=db, **options)


def describe(error):
    """Return an exception as one line of at most 200 characters, without the password."""
    # A reply like "unknown command 'AUTH', with args beginning with: 'secret'" shows the password.
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
    """Return a setting as an integer. Raise ValueError if it is not in this range."""
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
    try:
        get_redis_client()
        port = whole_number("PORT", 8080, 1, 65535)
    except ValueError as error:
        sys.exit(str(error))
    app.run(host=setting("HOST", "127.0.0.1"), port=port)
