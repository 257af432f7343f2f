"""Lesson 25: a hit counter on Redis, and a /health that answers with or without it."""

import functools
import gc
import os
import re
import signal
import socket
import sys
import threading
import time

from flask import Flask, abort, jsonify, request
from werkzeug.exceptions import HTTPException

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import ResponseError
    from redis.retry import Retry
except ImportError:  # without the package the app serves, and the counter is off
    redis = None
    ResponseError = ()

# --- Configuration


def setting(name, default):
    """Return the environment variable `name`, or `default` where it is unset or empty."""
    return os.environ.get(name) or default


def number(name, default, low, high):
    """Return the setting `name` as an integer. Raises ValueError where it is none from `low` to `high`."""
    value = setting(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", value) or not low <= int(value) <= high:
        raise ValueError(f"{name} is {value!r}: it must be a whole number from {low} to {high} (default {default})")
    return int(value)


def redis_address():
    """Return host, port and db as redis.Redis takes them, or None without REDIS_HOST. Raises ValueError."""
    host = setting("REDIS_HOST", None)
    port = number("REDIS_PORT", 6379, 1, 65535)
    db = number("REDIS_DB", 0, 0, 2**31 - 1)  # Redis counts its databases in a C int
    if host and not re.fullmatch(r"[\w-]{1,63}(\.[\w-]{1,63})*\.?|(?=.*:.*:)[0-9a-fA-F:.]+(%\w+)?", host):
        raise ValueError(f"REDIS_HOST is {host!r}: it must be a host name or an IP address and nothing else")
    return {"host": host, "port": port, "db": db} if host else None


# --- Redis

WAIT_SECONDS = 1  # for a connection, then for an answer
PAUSE_SECONDS = 0.7  # wait and pause together stay below the two seconds in which counting resumes

_redis_client = None
_made = None, None  # the client that was made here, and the class it was made of
_lock = threading.Lock()


def get_redis_client():
    """Return this process's Redis client, not yet connected; None where the counter is off.

    Raises ValueError for a bad REDIS_ setting, which only an import without `main` can meet.
    """
    global _redis_client, _made
    factory = redis and redis.Redis
    client, maker = _made
    if _redis_client is not None and (_redis_client is not client or factory is maker):
        return _redis_client
    with _lock:
        if _made == (client, maker):  # else another thread has just made one
            _redis_client = None
            if factory and setting("REDIS_HOST", None):
                _redis_client = factory(
                    **redis_address(),
                    socket_connect_timeout=WAIT_SECONDS,
                    socket_timeout=WAIT_SECONDS,
                    retry=Retry(NoBackoff(), 0),  # an INCR without an answer may have counted: never send it twice
                    protocol=2,  # with driver_info=None: no handshake, whose every step could wait once more
                    driver_info=None,
                )
                _made = _redis_client, factory
        return _redis_client


class Outage:
    """What is known of a client's Redis: nothing while `reason` is None, else that it fails, and why.

    A frozen Redis costs whoever asks it a wait. So after a failure one caller at a time asks again, after
    a pause, and all others get the reason at once. An error that Redis itself answers costs no wait and
    makes no pause. What was asked before the outage began, or ended, tells nothing of the time after.
    """

    def __init__(self, client):
        self.client = client
        self.reason = None
        self.answered = self.hit_failed = self.asking = False
        self.ask_again_at = self.changed_at = 0.0  # seconds of time.monotonic()

    def refuses(self, now):
        """Return the reason not to ask Redis, or None: then the caller asks, and reports `failed` or `succeeded`."""
        if self.reason is None:
            return None
        with _lock:
            if self.reason is None or self.answered:
                return None
            if self.asking or now < self.ask_again_at:
                return self.reason
            self.asking = True
            return None

    def failed(self, command, asked_at, reason, answered):
        """Note that a command failed, and whether Redis itself answered so."""
        with _lock:
            if asked_at < self.changed_at:
                return
            now = time.monotonic()
            if self.reason is None:
                app.logger.warning("Redis failed, hits are not counted: %s", reason)
                self.changed_at, self.hit_failed = now, False
            self.hit_failed = self.hit_failed or command == "incr"
            self.reason, self.answered, self.asking = reason, answered, False
            self.ask_again_at = now + PAUSE_SECONDS

    def succeeded(self, command, asked_at):
        """Note that Redis answered a command, which ends the outage, unless hits fail and it was a ping."""
        with _lock:
            if asked_at < self.changed_at:
                return
            self.asking = False
            if self.reason is not None and not (self.hit_failed and command == "ping"):
                app.logger.warning("Redis is back, hits are counted again")
                self.reason, self.changed_at = None, time.monotonic()


_outage = Outage(None)


def ask_redis(command, *args, valid):
    """Return (answer, None), or (None, the reason why there is none), or (None, None) with the counter off.

    Takes about WAIT_SECONDS at most for each address of the host, and as long as the resolver looks up its name.
    """
    global _outage
    try:
        client = get_redis_client()
    except ValueError as error:
        return None, str(error)
    if client is None:
        return None, None
    if _outage.client is not client:
        with _lock:
            if _outage.client is not client:
                _outage = Outage(client)
    outage = _outage
    asked_at = time.monotonic()
    if reason := outage.refuses(asked_at):
        return None, reason
    try:
        answer = getattr(client, command)(*args)
        if not valid(answer):
            raise TypeError(f"{command.upper()} was answered with {answer!r}: is that a Redis?")
    except Exception as error:  # what is no Redis makes the client raise more than RedisError
        reason = str(error) or type(error).__name__
        outage.failed(command, asked_at, reason, isinstance(error, ResponseError))
        return None, reason
    if outage.reason is not None:
        outage.succeeded(command, asked_at)
    return answer, None


# --- Routes

app = Flask(__name__, static_folder=None)

_started_at = time.monotonic()


@app.before_request
def refuse_double_slash():
    """Answer 404 to //health, which the router would take for /health."""
    if request.environ["PATH_INFO"].startswith("//"):
        abort(404)


@app.get("/")
def index():
    """Return the greeting and this hit's number; a HEAD is no hit."""
    hit_count = redis_error = None
    if request.method == "GET":
        hit_count, redis_error = ask_redis("incr", "lab25_hits", valid=lambda answer: type(answer) is int)
    response = jsonify(
        message="Hello from lab25",
        path=request.path,
        host=request.host,
        env=setting("LAB_ENV", "dev"),
        hit_count=hit_count,
        redis_error=redis_error,
    )
    if request.method == "HEAD":  # the length of a GET's answer depends on its number
        response.automatically_set_content_length = False
        del response.headers["Content-Length"]
    return response


@app.get("/health")
def health():
    """Return that this process can serve, which does not depend on Redis."""
    pong, _ = ask_redis("ping", valid=bool)
    return jsonify(
        status="ok",
        uptime_seconds=int(time.monotonic() - _started_at),
        hostname=socket.gethostname(),
        env=setting("LAB_ENV", "dev"),
        redis_ok=bool(pong),
        version=setting("BUILD_VERSION", "dev"),
        build_date=setting("BUILD_DATE", "unknown"),
    )


@app.errorhandler(HTTPException)
def error_as_json(error):
    """Return the error as JSON with its own status and headers; a crash arrives here as a bare 500."""
    response = error.get_response()
    response.data = jsonify(error=error.description).data
    response.content_type = "application/json"
    return response


# --- Start

LOGGING = {
    "formatters": {
        name: {"format": "%(asctime)s %(process)d %(levelname)s %(message)s"} for name in ("generic", "access")
    },
    "root": {"handlers": ["console"], "level": "INFO"},
}


def in_worker(started_at):
    """Return the app to a worker, which tells the age of the service and is ended by its parent alone.

    A worker that a terminal's Ctrl-C has reached too does not hear the SIGTERM, and is killed only after five seconds.
    """
    global _started_at
    _started_at = started_at
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    return app


def main():
    """Check the environment and serve until SIGTERM. Exits with one line for a value that cannot be used."""
    try:
        host, port = setting("HOST", "127.0.0.1"), number("PORT", 8080, 1, 65535)
        workers, access_log = number("WEB_CONCURRENCY", 2, 1, 64), number("ACCESS_LOG", 0, 0, 1)
        redis_at = redis_address()
    except ValueError as error:
        sys.exit(str(error))
    try:  # the server shares a port that is taken, and takes no host names
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if ":" in host else {}
        with socket.create_server((host, port), **family) as free:
            address = free.getsockname()[0]
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"HOST is {host!r} and PORT is {port}: {error}; set an address and a free port of this machine")

    from granian import Granian
    from granian.http import HTTP1Settings

    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # the C library looks up a name for ten seconds
    server = Granian(
        "app:app",
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        http1_settings=HTTP1Settings(header_read_timeout=10_000, max_buffer_size=65_536),
        workers=workers,
        blocking_threads=8,  # as many may wait a second when Redis freezes; with 6 it is 4 % slower, with 10 5 % faster
        respawn_failed_workers=True,
        # Seconds, for a client that never finishes its request, or a worker that missed the SIGTERM while it started;
        # Docker kills after ten.
        workers_kill_timeout=5,
        log_level="error",
        log_dictconfig=LOGGING,
        log_access=access_log == 1,
        log_access_format="%(addr)s %(method)s %(path)r %(status)d %(dt_ms).1f ms",
    )
    app.logger.info(
        "lab25-web %s on http://%s:%s, workers: %s, Redis: %s",
        setting("BUILD_VERSION", "dev"),
        f"[{host}]" if ":" in host else host,
        port,
        workers,
        "{host}:{port}/{db}".format(**redis_at) if redis_at else "none, nothing is counted",
    )
    if hasattr(signal, "SIGHUP"):  # not on Windows
        # A closed terminal ends the service, unless nohup started it; the server would take either for a reload.
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        server.on_startup(
            lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.getsignal(signal.SIGTERM))
        )
    gc.freeze()  # a collection in one worker would unshare the memory of all: 78 MiB instead of 59
    server.serve(target_loader=functools.partial(in_worker, _started_at), wrap_loader=False)


if __name__ == "__main__":
    main()
