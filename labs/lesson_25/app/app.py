"""Lesson 25: a hit counter on Redis, and a /health that answers with or without it."""

if (
    __name__ == "__main__"
):  # first of all: the imports take 0.3 s, in which process 1 of a container hears no signal
    from serve import main

    main()

import contextlib
import os
import re
import socket
import threading
import time

from flask import Flask, request
from werkzeug.exceptions import HTTPException

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.connection import parse_url
    from redis.exceptions import ReadOnlyError, ResponseError
    from redis.retry import Retry
except ImportError:  # without the package the app serves, and the counter is off
    redis, ResponseError = None, ()

# --- Where Redis is
HOST_NAME = r"[\w-]{1,63}(\.[\w-]{1,63})*\.?"
OPTIONS = r"(\?((db|username|password|ssl_(ca_certs|certfile|keyfile|cert_reqs|check_hostname))=[^&#]*&?)*)?"
URL = rf"(rediss?://([^@/?#]*@)?({HOST_NAME}|\[[\w:.%]+\])(:[1-9]\d*)?(/\d*)?|unix://([^@/?#]*@)?/[^?#]+){OPTIONS}"


def setting(name, default=None):
    """Return the environment variable `name`, or `default` where it is unset or empty."""
    return os.environ.get(name) or default


def number(name, default, low, high):
    """Return the setting `name` as an integer. Raises ValueError where it is none from `low` to `high`."""
    value = setting(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", value) or not low <= int(value) <= high:
        raise ValueError(
            f"{name} is {value!r}: it must be a whole number from {low} to {high} (default {default})"
        )
    return int(value)


def redis_password():
    """Return the password in REDIS_PASSWORD or in the file REDIS_PASSWORD_FILE, or None. Raises ValueError."""
    password, path = setting("REDIS_PASSWORD"), setting("REDIS_PASSWORD_FILE")
    if path:
        try:
            with open(path, encoding="utf-8") as file:
                password, problem = file.read().rstrip("\r\n"), "it is empty"
        except (OSError, UnicodeError) as error:
            password, problem = None, getattr(error, "strerror", "it is no text")
        if not password:
            raise ValueError(
                f"REDIS_PASSWORD_FILE is {path!r}: it must be a file with the password ({problem})"
            )
    return password


def redis_address():
    """Return the arguments for redis.Redis, or None where no Redis is configured. Raises ValueError."""
    for one, other in ("REDIS_HOST", "REDIS_URL"), ("REDIS_PASSWORD", "REDIS_PASSWORD_FILE"):
        if setting(one) and setting(other):
            raise ValueError(f"{one} and {other} are both set: unset one of them")
    host, url, password = setting("REDIS_HOST"), setting("REDIS_URL"), redis_password()
    shown = re.sub("(?s).*(@|[?]|//:).*", "***", url or host or "")  # there may be a password in it
    if url:
        try:
            address = {
                "host": "localhost",
                "port": 6379,
                "db": 0,
                **parse_url(re.fullmatch(URL, url)[0]),
            }
        except (
            TypeError,
            ValueError,
        ):  # no match, or a port or an option that redis-py does not take
            shape = "redis://USER:PASSWORD@HOST:6379/0, rediss://… or unix:///PATH, with %2F for a / in the password"
            raise ValueError(f"REDIS_URL is {shown!r}: it must look like {shape}") from None
        if password and "password" in address:
            raise ValueError(
                f"REDIS_URL is {shown!r}, with a password, and there is another one: unset one of them"
            )
        path, _ = address.pop("path", None), address.pop("connection_class", None)
        return {
            "password": password,
            "ssl": url.startswith("rediss:"),
            "unix_socket_path": path,
            **address,
        }
    port, db = (
        number("REDIS_PORT", 6379, 1, 65535),
        number("REDIS_DB", 0, 0, 2**31 - 1),
    )  # a C int in Redis
    if host and not re.fullmatch(rf"{HOST_NAME}|(?=.*:.*:)[0-9a-fA-F:.]+(%\w+)?", host):
        raise ValueError(
            f"REDIS_HOST is {shown!r}: it must be a host name or an IP address; for more, use REDIS_URL"
        )
    return {"host": host, "port": port, "db": db, "password": password} if host else None


# --- Redis
WAIT_SECONDS = 1  # for a connection, then for an answer
PAUSE_SECONDS = (
    0.5  # between two pings in an outage: a pause and a wait are less than the two seconds promised
)
QUIET_SECONDS = 3  # between two lines that say "back": a Redis that now fails and now answers must not fill the log

_redis_client = None
_made_client, _made_by, _password = (
    None,
    None,
    None,
)  # what was made here, by which redis.Redis, with what password
_watch = None  # the Watch of the client in use


def get_redis_client():
    """Return this process's Redis client, not yet connected; None where the counter is off. Raises ValueError."""
    global _redis_client, _made_client, _made_by, _password
    factory = redis and redis.Redis
    if _redis_client is None or (
        _redis_client is _made_client and factory is not _made_by
    ):  # a test replaced it
        address = (
            redis_address() if factory and (setting("REDIS_HOST") or setting("REDIS_URL")) else None
        )
        client = (
            address
            and factory(
                **address,
                socket_connect_timeout=WAIT_SECONDS,
                socket_timeout=WAIT_SECONDS,
                retry=Retry(
                    NoBackoff(), 0
                ),  # an INCR without an answer may have counted: never send it twice
                retry_on_error=[
                    ReadOnlyError
                ],  # before it would retry, redis-py reconnects: Redis may have moved
                protocol=2,  # with driver_info=None: neither HELLO nor CLIENT SETINFO, which could wait as well
                driver_info=None,
            )
        )
        _redis_client, _made_client, _made_by, _password = (
            client,
            client,
            factory,
            address and address["password"],
        )
    return _redis_client


class Watch:
    """A circuit breaker: a Redis that gives no answer costs whoever asks a wait, so others need not ask.

    The first to meet that begins an outage: from then on a thread asks, and all others are told the reason at once.
    A ResponseError is an answer and costs no wait. No lock is taken: the worst of a race is a line told twice.
    """

    def __init__(self, seams):
        self.seams = seams  # get_redis_client and _redis_client: a test may replace them, and wants a new Watch then
        self.outage = None  # the reason, for as long as it lasts
        self.news_asked_at = self.quiet_until = 0.0  # in seconds of time.monotonic()
        self.told = {}  # the kinds of failure that the log has told and not taken back; the last command to meet each
        threading.Thread(target=self.end_outages, daemon=True).start()

    def ask(self, client, command, *arguments):
        """Return (answer, None), or (None, the reason why there is none)."""
        asked_at, reason, kind, answered = time.monotonic(), None, None, True
        try:
            answer = getattr(client, command)(*arguments)
            if not (answer if command == "ping" else type(answer) is int):
                raise TypeError(f"{command.upper()} was answered with {answer!r}: is that a Redis?")
        except Exception as error:  # what is no Redis makes the client raise more than RedisError
            answer, answered, text = None, isinstance(error, ResponseError), str(error)
            reason = (
                f"{type(error).__name__}: {text}" if answered or not text else text
            )  # MOVED has only its name
            reason = reason.replace(
                _password or "***", "***"
            )  # some servers repeat an AUTH that they do not know
            kind = (type(error), text.split(" ")[0] if answered else None)
        if (
            reason or self.told
        ) and asked_at >= self.news_asked_at:  # of two answers that to the later question counts
            self.news_asked_at, self.outage = asked_at, None if answered else reason
            self.tell(command, reason, kind)
        return answer, reason

    def tell(self, command, reason, kind):
        """Tell the log what is new."""
        if reason:
            new = kind not in self.told
            self.told[kind] = command  # a failure that a ping has met too, a ping may take back
            if new:
                app.logger.warning("Redis failed, hits are not counted: %s", reason)
        elif self.news_asked_at > self.quiet_until and (
            command == "incr" or "incr" not in self.told.values()
        ):
            self.told, self.quiet_until = {}, self.news_asked_at + QUIET_SECONDS
            app.logger.warning("Redis is back, hits are counted again")

    def end_outages(self):
        """Ping in an outage until Redis answers; stop when a test replaces a seam."""
        while self.seams == (get_redis_client, _redis_client):
            if self.outage:
                with contextlib.suppress(BaseException):  # whatever a client raises, this goes on
                    client = get_redis_client()
                    self.ask(client, "ping")
                    client.connection_pool.disconnect(
                        inuse_connections=False
                    )  # idle ones may lead to where it was
            time.sleep(PAUSE_SECONDS)
        self.seams = None


def ask_redis(command, *arguments):
    """Return (answer, None), or (None, the reason why there is none), or (None, None) with the counter off."""
    global _watch
    try:
        client, seams = get_redis_client(), (get_redis_client, _redis_client)
        if client is not None and (not _watch or _watch.seams != seams):
            _watch = Watch(seams)
    except Exception as error:  # a bad setting, or no thread to be had
        return None, str(error)
    if client is None:
        missing = not redis and (setting("REDIS_HOST") or setting("REDIS_URL"))
        return None, "the Python package redis is not installed" if missing else None
    reason = _watch.outage
    return (None, reason) if reason else _watch.ask(client, command, *arguments)


# --- Routes
app = Flask(__name__, static_folder=None)
start_time = time.monotonic()  # of the service: serve.py hands its own to every worker


@app.get("/")
def index():
    """Return the greeting and this hit's number; a HEAD is no hit."""
    hit_count, redis_error = (
        ask_redis("incr", "lab25_hits") if request.method == "GET" else (None, None)
    )
    answer = {"message": "Hello from lab25", "path": request.path, "host": request.host}
    return {
        **answer,
        "env": setting("LAB_ENV", "dev"),
        "hit_count": hit_count,
        "redis_error": redis_error,
    }


@app.get("/health")
def health():
    """Return that this process can serve, which does not depend on Redis."""
    here = {
        "hostname": socket.gethostname(),
        "env": setting("LAB_ENV", "dev"),
        "redis_ok": bool(ask_redis("ping")[0]),
    }
    build = {
        "version": setting("BUILD_VERSION", "dev"),
        "build_date": setting("BUILD_DATE", "unknown"),
    }
    return {"status": "ok", "uptime_seconds": int(time.monotonic() - start_time), **here, **build}


@app.errorhandler(HTTPException)
def error_as_json(error):
    """Return the error as JSON with its own status and headers; a crash arrives here as a bare 500."""
    headers = [(name, value) for name, value in error.get_headers() if name != "Content-Type"]
    return {"error": error.description}, error.code, headers
