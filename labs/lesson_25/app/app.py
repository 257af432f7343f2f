"""A hit counter on Redis, and a /health that answers with or without it.

This file is the service: what it is told, how it asks Redis, what it answers. It stands alone:
`python app.py` runs it in Flask's development server, and there every request asks Redis.
In production serve.py starts it, with watch.py beside it. This file imports neither of them.
"""

import os
import re
import socket
import time

from flask import Flask, request
from werkzeug.exceptions import HTTPException

try:
    import redis
except ImportError:  # the service runs without the package, but cannot count
    redis = None

HITS_KEY = "lab25_hits"
MAX_DB = 2**31 - 1  # Redis keeps the number of a database in a C int

# How long a request waits for Redis, each time that it waits: for an answer, and on a new
# connection before that for the connection itself, TLS, AUTH and SELECT, where they are used.
# That is 0.5 s as a rule and 2.5 s at worst. The look-up of the name comes on top: serve.py
# limits it to 1 s for each name server.
WAIT_SECONDS = 0.5

REASON_CHARACTERS = 200  # of redis_error, and in the log: some errors of Redis are a page


# --- What it is told: environment variables, where an empty one counts as unset


def setting(name, default=None):
    """Return the environment variable `name`, or `default` where it is unset or empty."""
    return os.environ.get(name) or default


def whole_number(name, default, lowest, highest):
    """Return the setting `name` as an integer.

    Raises ValueError, with a sentence for the user, where it is no number in this range.
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

    Raises ValueError where REDIS_PASSWORD_FILE names a file that holds none.
    """
    path = setting("REDIS_PASSWORD_FILE")
    if path is None:
        return setting("REDIS_PASSWORD")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            password = file.read().rstrip("\r\n")
        problem = "it is empty"
    except OSError as error:
        password = None
        problem = error.strerror
    except UnicodeError:
        password = None
        problem = "it is not UTF-8 text"
    if password:
        return password
    raise ValueError(
        f"REDIS_PASSWORD_FILE is {path!r}: it must be a file with the password ({problem})"
    )


# --- Redis

_redis_client = None  # made when it is first needed
watch = None  # serve.py puts a watch.Watch here: it knows why hits are not counted just now


def get_redis_client():
    """Return this process's Redis client, which need not be connected yet.

    Returns None where the counter is off. Raises ValueError where a setting cannot be used.
    """
    global _redis_client
    if redis is None:
        return None
    if _redis_client is None:
        _redis_client = make_redis_client()  # two threads may each make one: the later one stays
    return _redis_client


def make_redis_client():
    """Return a new client, not connected, or None where no Redis is configured.

    Raises ValueError where a setting cannot be used.
    """
    if setting("REDIS_URL"):
        return client_for_url(setting("REDIS_URL"))
    if setting("REDIS_HOST"):
        return client_for_host(setting("REDIS_HOST"))
    return None


def client_for_host(host):
    """Return a client for the Redis at `host`, REDIS_PORT and REDIS_DB. Raises ValueError."""
    port = whole_number("REDIS_PORT", 6379, 1, 65535)
    db = whole_number("REDIS_DB", 0, 0, MAX_DB)
    return redis.Redis(host=host, port=port, db=db, **client_options())


def client_for_url(url):
    """Return a client for the Redis at this address. Raises ValueError."""
    options = client_options()
    try:
        return redis.Redis.from_url(url, **options)
    except Exception:  # its own words are not shown: they may hold a part of the password
        raise ValueError("REDIS_URL cannot be used: it is no address of a Redis") from None


def client_options():
    """Return the options that every client is made with. Raises ValueError."""
    return {
        "password": redis_password(),
        "socket_connect_timeout": WAIT_SECONDS,
        "socket_timeout": WAIT_SECONDS,
        # An INCR without an answer may have counted. Sent again, it would count twice.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        # A new connection sends neither HELLO nor CLIENT SETINFO: each would be one more wait.
        "protocol": 2,
        "driver_info": None,
    }


# --- What Redis is asked


# Each question raises whatever the client raises, and TypeError for an answer of the wrong kind.


def count_hit(client):
    """Count one hit and return its number."""
    return must_be_a_number(client.incr(HITS_KEY))


def must_be_a_number(answer):
    """Return the answer to an INCR or INCRBY. Raises TypeError where it is no integer."""
    if type(answer) is not int:
        raise TypeError(f"INCR was answered with {answer!r}: is that a Redis?")
    return answer


def ping(client):
    """Return True where Redis answers."""
    answer = client.ping()
    if not answer:
        raise TypeError(f"PING was answered with {answer!r}: is that a Redis?")
    return True


def ask_redis(question):
    """Ask Redis one of the questions above, unless it is known that hits are not counted.

    Returns (answer, None), or (None, the reason why there is no answer), or (None, None) where
    the counter is off. Never raises.
    """
    outage = watch.outage if watch else None  # read once, because another thread may change it
    if outage:
        return None, outage
    answer, reason = ask_redis_now(question)
    if reason and watch:
        watch.report_failure(reason)
    return answer, reason


def ask_redis_now(question):
    """Ask in any case, and return what ask_redis returns. Never raises."""
    try:
        client = get_redis_client()
    except Exception as error:
        return None, str(error)
    if client is None:
        return None, why_the_counter_is_off()
    try:
        return question(client), None
    except Exception as error:  # what is no Redis makes the client raise more than RedisError
        return None, in_one_line(error, client)


def why_the_counter_is_off():
    """Return why there is no client: None where that is what was asked for."""
    if redis is None and (setting("REDIS_HOST") or setting("REDIS_URL")):
        return "the Python package redis is not installed"
    return None


def in_one_line(error, client):
    """Return what an error says, in one short line and without the client's password."""
    # Redis repeats the start of a command that it does not know, which may be AUTH.
    text = str(error).partition(", with args beginning with")[0]
    options = getattr(client, "get_connection_kwargs", dict)()  # a test's stand-in may have none
    password = options.get("password")
    if isinstance(password, str):
        text = text.replace(password, "***")
    # With the name of its class, because some texts mean nothing alone: `3035 172.19.0.4:6379`.
    line = " ".join(f"{type(error).__name__}: {text}".split())
    return line[:REASON_CHARACTERS]


# --- What it answers

app = Flask(__name__, static_folder=None)
start_time = time.monotonic()  # of the service: serve.py hands its own to every worker


@app.get("/")
def index():
    """Return the greeting and this hit's number. A HEAD is no hit."""
    hit_count = None
    redis_error = None
    if request.method == "GET":
        hit_count, redis_error = ask_redis(count_hit)
    return {
        "message": "Hello from lab25",
        "path": request.path,
        "host": request.host,
        "env": setting("LAB_ENV", "dev"),
        "hit_count": hit_count,
        "redis_error": redis_error,
    }


@app.get("/health")
def health():
    """Return that this process can serve, which does not depend on Redis."""
    redis_answers, _ = ask_redis(ping)
    return {
        "status": "ok",
        "uptime_seconds": int(time.monotonic() - start_time),
        "hostname": socket.gethostname(),
        "env": setting("LAB_ENV", "dev"),
        "redis_ok": redis_answers is True,
        "version": setting("BUILD_VERSION", "dev"),
        "build_date": setting("BUILD_DATE", "unknown"),
    }


@app.errorhandler(HTTPException)
def error_as_json(error):
    """Return an error as JSON with its own status and headers. A crash arrives as a bare 500."""
    headers = [(name, value) for name, value in error.get_headers() if name != "Content-Type"]
    return {"error": error.description}, error.code, headers


if __name__ == "__main__":
    app.run(host=setting("HOST", "127.0.0.1"), port=whole_number("PORT", 8080, 1, 65535))
