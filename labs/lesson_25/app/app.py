"""A hit counter on Redis, and a /health that answers with or without it.

This file is the service: its settings, how it asks Redis, and what it answers. It needs no other
file: `python app.py` runs it in Flask's development server. In production serve.py starts it and
adds a circuit breaker, so that requests need not wait for a Redis that is known to be away.
"""

import os
import re
import socket
import time
from typing import NamedTuple

from flask import Flask, request
from werkzeug.exceptions import HTTPException

try:
    import redis
except ImportError:  # the service runs without the package, but cannot count
    redis = None

# The limit on each wait for Redis. How long one request may wait, at worst:
#
#   0.5 s   on an open connection: for the answer
#   3.5 s   on a new connection: 1 s for the look-up of the name (serve.py sets this limit), and
#           0.5 s each for the connection, TLS, AUTH, SELECT and the answer
#
# It is more where several name servers, or several addresses of the name, are tried in turn. In
# production a request may also have to wait for a free thread of its worker (see THREADS in
# serve.py).
WAIT_SECONDS = 0.5

HITS_KEY = "lab25_hits"
MAX_DB = 2**31 - 1  # Redis keeps the number of a database in a C int
MAX_REASON_CHARACTERS = 200  # some error messages of Redis fill a page


# --- Settings: environment variables. An empty one counts as unset. A new setting is read where it
# --- is used, by one of these functions. If a bad value has to stop the start, it is checked there,
# --- too: main() in serve.py checks the server's settings, checks.py those of Redis.


def setting(name, default=None):
    """Return the environment variable `name`, or `default` where it is unset or empty."""
    return os.environ.get(name) or default


def whole_number(name, default, lowest, highest):
    """Return the setting `name` as an integer.

    Raises ValueError, with a sentence for the user, where it is not a number in this range.
    """
    text = setting(name, str(default))
    if re.fullmatch("[0-9]{1,10}", text) and lowest <= int(text) <= highest:
        return int(text)
    raise ValueError(
        f"{name} is {text!r}: it must be a whole number from {lowest} to {highest}"
        f" (default {default})"
    )


def redis_password():
    """Return the password for Redis, or None where none is set.

    Raises ValueError where REDIS_PASSWORD_FILE is set and no password can be read from it.
    """
    path = setting("REDIS_PASSWORD_FILE")
    if path is None:
        return setting("REDIS_PASSWORD")
    message = f"REDIS_PASSWORD_FILE is {path!r}: it must be a file with the password"
    try:
        with open(path, encoding="utf-8") as file:
            password = file.read().rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"{message} ({error.strerror})") from None
    except UnicodeError:
        raise ValueError(f"{message} (it is not UTF-8 text)") from None
    if not password:
        raise ValueError(f"{message} (it is empty)")
    return password


def redis_is_configured():
    """Return whether the settings say where Redis is. If not, the service does not count."""
    return bool(setting("REDIS_URL") or setting("REDIS_HOST"))


# --- The Redis client

_redis_client = None  # made when it is first needed
_passwords = set()  # of all clients: failure_of, below, hides them in error messages


def get_redis_client():
    """Return this process's Redis client. It may not be connected yet.

    Returns None where Redis is not configured or the package redis is missing. Raises ValueError
    where a setting cannot be used.
    """
    global _redis_client
    if redis is None:
        return None
    if _redis_client is None:
        # Without serve.py, two threads may both come here and make a client each. Both clients
        # work, and the later one is kept.
        _redis_client = make_redis_client()
    return _redis_client


def make_redis_client():
    """Return a new client, not connected, or None where Redis is not configured.

    Raises ValueError where a setting cannot be used.
    """
    if setting("REDIS_URL"):
        return client_for_url(setting("REDIS_URL"))
    if setting("REDIS_HOST"):
        return client_for_host(setting("REDIS_HOST"))
    return None


def client_for_host(host):
    """Return a client for the Redis at this host, REDIS_PORT and REDIS_DB. Raises ValueError."""
    port = whole_number("REDIS_PORT", 6379, 1, 65535)
    db = whole_number("REDIS_DB", 0, 0, MAX_DB)
    return redis.Redis(host=host, port=port, db=db, **client_options())


def client_for_url(url):
    """Return a client for the Redis at this address. Raises ValueError.

    An option in the address wins over ours: `?socket_timeout=60` would make a request wait for a
    minute. In production checks.py refuses an address with such an option.
    """
    options = client_options()
    try:
        client = redis.Redis.from_url(url, **options)
    except Exception:  # the error's own text is not shown: it may hold a part of the password
        raise bad_url("it is no address, or an option has a wrong value") from None
    password = client.get_connection_kwargs().get("password")  # it may be in the address
    if password:
        _passwords.add(password)
    return client


def bad_url(problem):
    """Return the exception for a REDIS_URL that cannot be used."""
    return ValueError(
        f"REDIS_URL cannot be used: {problem}. It must look like"
        " redis://USER:PASSWORD@HOST:6379/0, rediss://… (TLS) or unix:///PATH"
    )


def client_options():
    """Return the options that every client is made with. Raises ValueError."""
    password = redis_password()
    if password:
        _passwords.add(password)
    return {
        "password": password,
        "socket_connect_timeout": WAIT_SECONDS,
        "socket_timeout": WAIT_SECONDS,
        # No retries: an INCR without an answer may have counted, and sent again it would count
        # twice. After such an INCR redis-py closes the connection, so that no later hit can read
        # the late answer.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        # With these two a new connection sends no HELLO and no CLIENT SETINFO, which would be
        # two more waits.
        "protocol": 2,
        "driver_info": None,
    }


# --- Questions to Redis. Each is a function of a client.


def count_hit(client):
    """Count one hit and return its number. Raises what redis-py raises, or TypeError."""
    return check_count(client.incr(HITS_KEY))


def check_count(answer):
    """Return the answer to an INCR. Raises TypeError where it is not a number.

    A server that is no Redis may answer with a text, and redis-py returns that.
    """
    if type(answer) is not int:  # isinstance would take True for a number
        raise TypeError(f"INCR was answered with {answer!r}: is that a Redis?")
    return answer


def ping(client):
    """Return True if Redis answers. Raises what redis-py raises, or TypeError."""
    try:
        answer = client.ping()
    except redis.exceptions.NoPermissionError:
        return True  # Redis has answered: this user may not ask for a PING
    if not answer:
        raise TypeError(f"PING was answered with {answer!r}: is that a Redis?")
    return True


# --- Asking a question


class Failure(NamedTuple):
    """Why a question has no answer: the kind of the failure, and one line of text about it."""

    kind: str
    reason: str


# The circuit breaker: an object of watch.py, which serve.py sets in each worker process. Its
# `outage` is a Failure, or None while all is well. Without a breaker every request asks Redis.
breaker = None


def ask_redis(question):
    """Ask Redis a question. In an outage, return the reason of the outage instead, at once.

    Returns (answer, None) or (None, failure). Where Redis is not configured, which is no failure,
    it returns (None, None). Never raises.

    Any exception from the question counts as a failure of Redis, and begins an outage. So a
    question about another key has to catch what only concerns that key, such as a value of the
    wrong type (README.md shows how).
    """
    if breaker is None:
        return ask_redis_now(question)
    outage = breaker.outage  # read once, because other threads change it
    if outage:
        return None, outage
    answer, failure = ask_redis_now(question)
    if failure:
        breaker.begin_outage(failure)
    return answer, failure


def ask_redis_now(question):
    """Ask Redis a question, whether there is an outage or not. Returns what ask_redis returns."""
    if redis is None and redis_is_configured():
        return None, Failure("ImportError", "the Python package redis is not installed")
    try:
        client = get_redis_client()
        if client is None:  # Redis is not configured
            return None, None
        return question(client), None
    except Exception as error:  # not only RedisError: a server that is no Redis causes others
        return None, failure_of(error)


def failure_of(error):
    """Return an exception as a Failure: in one short line, without a password."""
    kind = type(error).__name__
    text = str(error)
    # A server that does not know the command AUTH answers: "unknown command 'AUTH', with args
    # beginning with: " and then the password, or only its beginning, which the loop below would
    # not find. So this end of the text is cut off.
    text = text.partition(", with args beginning with")[0]
    for password in list(_passwords):  # a copy, because another thread may add one
        text = text.replace(password, "***")
    # The kind comes first, because not every text says what happened: that of a MovedError is
    # "3035 172.19.0.4:6379".
    reason = f"{kind}: {text}"
    one_line = " ".join(reason.split())
    return Failure(kind, one_line[:MAX_REASON_CHARACTERS])


# --- Answers to requests. For a new route that uses Redis, write its question above and the route
# --- here. A metric belongs here, too, in a function for Flask's after_request. Every worker
# --- process counts for itself: prometheus_client adds them up in its "multiprocess mode".

app = Flask(__name__, static_folder=None)
# When the service started. serve.py hands the time of its own start to every worker, also to one
# that is started later.
start_time = time.monotonic()


@app.get("/")
def index():
    """Return the greeting and the number of this hit. A HEAD request is not a hit."""
    if request.method == "GET":
        hit_count, failure = ask_redis(count_hit)
    else:
        hit_count, failure = None, None
    return {
        "message": "Hello from lab25",
        "path": request.path,
        "host": request.host,
        "env": setting("LAB_ENV", "dev"),
        "hit_count": hit_count,
        "redis_error": failure.reason if failure else None,
    }


@app.get("/health")
def health():
    """Return status 200 with or without Redis: it says that this process can serve."""
    redis_answers, _ = ask_redis(ping)
    return {
        "status": "ok",
        "uptime_seconds": int(time.monotonic() - start_time),
        "hostname": socket.gethostname(),
        "env": setting("LAB_ENV", "dev"),
        "redis_ok": bool(redis_answers),
        "version": setting("BUILD_VERSION", "dev"),
        "build_date": setting("BUILD_DATE", "unknown"),
    }


@app.errorhandler(HTTPException)
def error_as_json(error):
    """Return an error as JSON, with its status and its headers (405 has Allow).

    For an unexpected exception Flask logs the traceback and calls this with a plain 500.
    """
    # Not the Content-Type of the error: that is HTML, and the answer is JSON.
    headers = [(name, value) for name, value in error.get_headers() if name != "Content-Type"]
    return {"error": error.description}, error.code, headers


if __name__ == "__main__":
    app.run(host=setting("HOST", "127.0.0.1"), port=whole_number("PORT", 8080, 1, 65535))
