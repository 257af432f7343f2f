"""The start: `python serve.py` checks the settings, then serves app.py until it is told to end.

It needs a Unix system. The server is granian: a parent process, and worker processes that answer
the requests. Each worker is forked from the parent, or, where Python does not fork (macOS, and
Linux from Python 3.14 on), imports the modules anew.
"""

import signal

# How the service is told to end: by docker stop or systemd, by Ctrl-C, by a closed terminal.
END_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

if __name__ == "__main__":
    # From here on these signals are kept until wait_for_end_signal, below, takes them. This comes
    # before the other imports, which take 0.3 s: in a container, where this is process 1, Linux
    # would throw away a signal that comes meanwhile.
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)

import gc
import ipaddress
import multiprocessing
import os
import re
import resource
import socket
import ssl
import sys
import threading
import urllib.parse
from functools import partial

from granian import Granian
from granian.http import HTTP1Settings

import app
from app import MAX_DB, setting, whole_number
from watch import CircuitBreaker

# With 16 workers the service stays within the limits on processes and memory that the Compose
# files set, also under load.
MAX_WORKERS = 16

# Requests that one worker works on at the same time. All of them may be waiting for Redis for
# half a second. With 6 threads the service answers 4 % fewer requests a second.
THREADS = 8

# Connections that one worker holds at the same time. Most of them are idle ones, kept by clients
# for their next request. 4,000 idle connections take about 50 MiB.
MAX_CONNECTIONS = 5_000

# After this time without a complete request, a connection is closed. It must be longer than load
# balancers keep an idle connection (60 s): if the service closes it first, a request is lost.
IDLE_SECONDS = 75

# At the end, a request may take this time before its worker is killed. Docker waits for 10 s.
KILL_SECONDS = 5

# granian adds this to its own configuration of logging. There, "console" is a handler, and
# "generic" and "access" are the formats of messages and of the access log.
LOG_FORMAT = {"format": "%(asctime)s %(process)d %(levelname)s %(message)s"}
LOGGING = {
    "formatters": {"generic": LOG_FORMAT, "access": LOG_FORMAT},
    "root": {"handlers": ["console"], "level": "INFO"},
}


# --- Checking where Redis is. All checks are made without a connection. No error message shows a
# --- part of REDIS_HOST or REDIS_URL, because any part of a wrong one may be a password.


def check_redis():
    """Return where Redis is, in words for the log.

    Raises ValueError, with a sentence for the user, where a setting cannot be used.
    """
    refuse_both("REDIS_HOST", "REDIS_URL")
    refuse_both("REDIS_PASSWORD", "REDIS_PASSWORD_FILE")
    if not app.redis_is_configured():
        return "none, no counter"
    if app.redis is None:
        return "none, no counter (the Python package redis is not installed)"
    if setting("REDIS_URL"):
        check_redis_url(setting("REDIS_URL"))
    else:
        check_redis_host(setting("REDIS_HOST"))
    client = app.get_redis_client()  # checks REDIS_PORT and REDIS_DB; forked workers use it too
    connection = new_connection(client)
    if isinstance(connection, app.redis.UnixDomainSocketConnection):
        return connection.path
    return f"{connection.host}:{connection.port}/{connection.db}"


def refuse_both(one, other):
    """Raise ValueError where both settings are set."""
    if setting(one) and setting(other):
        raise ValueError(f"{one} and {other} are both set: unset one of them")


def new_connection(client):
    """Return a new connection of this client, which is not open yet.

    Raises an exception of redis-py's choice where it does not take an option of the client.
    """
    pool = client.connection_pool
    return pool.connection_class(**pool.connection_kwargs)


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


def check_redis_url(url):
    """Raise ValueError where REDIS_URL cannot be used."""
    problem = problem_of_url(url)
    if problem:
        raise ValueError(
            f"REDIS_URL cannot be used: {problem}. It must look like"
            " redis://USER:PASSWORD@HOST:6379/0, rediss://… (TLS) or unix:///PATH"
        )


def problem_of_url(url):
    """Return what is wrong with an address, or None.

    redis-py takes many wrong addresses. Some of them fail only at the first hit, others lead to
    another Redis or another database than was meant. These are refused here.
    """
    if not url.startswith(("redis://", "rediss://", "unix://")):
        return "it begins with none of redis://, rediss:// and unix://"
    if "#" in url:
        return "it has a #, which must be written %23"
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port  # raises ValueError above 65535, and where it is not a number
    except ValueError:
        return (
            "its port cannot be read"
            " (in a password, write / as %2F, ? as %3F, @ as %40, [ as %5B and ] as %5D)"
        )
    if parts.scheme == "unix":
        problem = problem_of_socket(parts.hostname, parts.path)
    else:
        problem = problem_of_place(parts.hostname, port, parts.path)
    if problem:
        return problem
    return problem_of_options(url, parts)


def problem_of_socket(host, path):
    """Return what is wrong with these parts of a unix:// address, or None."""
    if host:
        return "it must have three slashes before the path of its socket: unix:///PATH"
    if not path:
        return "it names no socket"
    return None


def problem_of_place(host, port, path):
    """Return what is wrong with these parts of a redis:// or rediss:// address, or None."""
    if not host:
        return "it names no host"
    problem = problem_of_host(urllib.parse.unquote(host))
    if problem:
        return f"its host cannot be right: {problem}"
    if port == 0:
        return "its port is not from 1 to 65535"
    if not re.fullmatch("/?[0-9]*", path):
        return "what follows its host is not the number of a database"
    return None


# An address may have these options after its ?. Others could set a time limit of their own.
TLS_OPTIONS = {
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
}
URL_OPTIONS = TLS_OPTIONS | {"db", "username", "password"}


def problem_of_options(url, parts):
    """Return what is wrong with the options of an address, or with their values, or None.

    `parts` is what urlsplit has made of `url`.
    """
    options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    if not options.keys() <= URL_OPTIONS:
        return f"it has an option that is none of {', '.join(sorted(URL_OPTIONS))}"
    if "" in options.values():
        return "it has an option without a value"
    has_tls_options = bool(options.keys() & TLS_OPTIONS)
    if has_tls_options and parts.scheme != "rediss":
        return "it has an option for TLS, which needs rediss://"
    password = app.redis_password()  # raises ValueError, with its own sentence, for a bad file
    if password and (parts.password or "password" in options):
        return "it has a password, and another one is set: unset one of them"
    try:
        client = app.client_for_url(url)  # only for this check
        connection = new_connection(client)
    except Exception:
        return "redis-py does not take the value of an option"
    if not 0 <= connection.db <= MAX_DB:
        return f"its database is not from 0 to {MAX_DB}"
    if parts.scheme == "rediss":
        return problem_of_tls_files(connection)
    return None


def problem_of_tls_files(connection):
    """Return what is wrong with the files that a connection for TLS names, or None."""
    try:
        context = ssl.create_default_context(cafile=connection.ca_certs)
        if connection.certfile or connection.keyfile:
            # If the key is encrypted, this password is wrong, and the key is refused. Without
            # any password, OpenSSL would ask for one at the terminal.
            context.load_cert_chain(connection.certfile, connection.keyfile, password="")
    except (OSError, TypeError):  # TypeError: a key without a certificate
        return "a file that it names cannot be read, or holds no certificate or no key"
    return None


# --- Checking where to listen


def check_address(host, port):
    """Return the IP address to listen on. Raises ValueError where that is not possible.

    granian needs an IP address, and would share a port that another program uses. So the host name
    is looked up here, and the port is tried: this process listens on it for a moment.
    """
    options = {}
    if ":" in host:
        options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
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


def allow_open_files(count):
    """Let this process and its workers open so many files, if the system allows it.

    A connection is an open file, and some systems start with a limit of 256.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


# --- Serving, and the end
#
# A pipe leads from the parent to its workers. Nothing is sent through it: when it is closed, the
# workers know that they have to end. How the service ends:
#
# 1. An end signal arrives: at the parent (docker stop), at all processes (Ctrl-C), or at one
#    after the other (systemd). All processes block it. Only wait_for_end_signal, a thread of the
#    parent, takes it. It wakes granian's main loop, which calls Server.shutdown.
# 2. Server.shutdown tells granian that its workers are about to end, and closes the pipe.
#    (granian then also sends them a SIGTERM, which they block.)
# 3. wait_for_parent, a thread of each worker, sees that the pipe is closed. From now on every
#    answer closes its connection. It calls granian's function that ends the worker.
# 4. granian finishes the requests that a worker has begun. The worker ends.
# 5. The parent waits for its workers, kills them after KILL_SECONDS, and ends with status 0.
#
# If the parent is killed, the system closes the pipe, and the workers end by steps 3 and 4.
#
# granian 2.8.7 by itself would have every process act on the signal. A worker that is quicker than
# the parent then counts as crashed, and the service ends with status 1.


class Server(Granian):
    """granian, with another way to end.

    It uses these inner names of granian 2.8.7: `wrks`, `interrupt_by_parent`,
    `signal_handler_interrupt` and `shutdown`. See also end_with_parent.
    """

    def __init__(self, **settings):
        # granian wants the name of the app, though load_app, below, returns the app itself.
        super().__init__("app:app", **settings)
        self.pipe_reader, self.pipe_writer = multiprocessing.Pipe(duplex=False)

    def run(self):
        """Serve until an end signal. Exits with status 1 if workers crash again and again."""
        end_signals = set(END_SIGNALS)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup sets it
            end_signals.remove(signal.SIGHUP)  # SIGHUP stays blocked, and nobody waits for it
        # An end signal may have come already. Then the new thread tells granian before `serve` is
        # called, and granian ends as soon as it has started.
        start_thread(wait_for_end_signal, end_signals, self)
        # Every new worker calls load_app with these arguments.
        load = partial(load_app, app.start_time, self.pipe_reader, self.pipe_writer)
        self.serve(target_loader=load, wrap_loader=False)

    def shutdown(self, exit_code=0):
        """Have the workers end, and wait for them. granian's main loop calls it."""
        for worker in self.wrks:
            worker.interrupt_by_parent = True  # or granian takes its end for a crash
        self.pipe_writer.close()
        super().shutdown(exit_code)


def start_thread(function, *arguments):
    """Call a function in a thread that does not keep the process from ending."""
    threading.Thread(target=function, args=arguments, daemon=True).start()


def wait_for_end_signal(end_signals, server):
    """Wait for one of these signals, then have the server end.

    granian's own handlers for signals can hang for ever. Python runs a handler in the main thread,
    in the middle of what that does. granian's handler sets an event, which takes the event's
    lock. If the main thread was holding this lock, it now waits for itself. Here the event is set
    by another thread, which can wait until the main thread has given the lock back.
    """
    signal.sigwait(end_signals)
    server.signal_handler_interrupt()


def load_app(start_time, pipe_reader, pipe_writer):
    """Return the app to granian, in a new worker."""
    # A forked worker inherits the blocked signals. One that is not forked has to block them.
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    # The worker has a copy of the pipe's writer. The parent must be the only one that has one.
    pipe_writer.close()
    ending = threading.Event()
    end_with_parent(pipe_reader, ending)

    app.start_time = start_time
    app.app.after_request(partial(close_connection_if, ending))
    if app.get_redis_client():
        app.breaker = CircuitBreaker()
        app.breaker.start_watch()
    return app.app


def close_connection_if(ending, response):
    """Return the response. If the worker is ending, the response closes the connection.

    Otherwise a client that always has another request would keep the worker from ending.
    """
    if ending.is_set():
        response.headers["Connection"] = "close"
    return response


def end_with_parent(pipe_reader, ending):
    """Have this worker set `ending` and end when its parent closes the pipe.

    A worker is ended by calling its handler for SIGTERM. This file calls it as a function, because
    the signal itself is blocked and never runs it. Which function that is changes once:

    - until granian serves: end_at_once, which is set here;
    - from then on: granian's, which finishes the requests first. granian sets it itself.
    """
    signal.signal(signal.SIGTERM, end_at_once)

    def wait_for_parent():
        pipe_reader.poll(None)  # returns when the pipe is closed
        ending.set()
        handler = signal.getsignal(signal.SIGTERM)
        handler(signal.SIGTERM, None)

    start_thread(wait_for_parent)


def end_at_once(number, frame):
    """End a worker that has no requests yet. It has the arguments of a handler for a signal."""
    os._exit(0)


def main():
    """Check the settings and serve. Exits with one line for a setting that cannot be used."""
    # The C library reads this when it looks up a name. Without it, a name server that does not
    # answer would take ten seconds.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    try:
        host = setting("HOST", "127.0.0.1")
        port = whole_number("PORT", 8080, 1, 65535)
        workers = whole_number("WEB_CONCURRENCY", 2, 1, MAX_WORKERS)
        access_log = whole_number("ACCESS_LOG", 0, 0, 1)
        where_redis_is = check_redis()
        address = check_address(host, port)
    except ValueError as error:
        sys.exit(str(error))

    allow_open_files(MAX_CONNECTIONS + 1_000)  # 1,000 for connections to Redis and all else
    server = Server(  # which sets up the log, too
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        http1_settings=HTTP1Settings(
            header_read_timeout=IDLE_SECONDS * 1000,  # ms, also for the wait for the next request
            max_buffer_size=65_536,  # bytes, for the headers of a request
        ),
        backpressure=MAX_CONNECTIONS,
        workers=workers,
        blocking_threads=THREADS,
        respawn_failed_workers=True,
        workers_kill_timeout=KILL_SECONDS,
        log_level="error",  # of granian's own messages
        log_dictconfig=LOGGING,
        log_access=access_log == 1,
        log_access_format="%(addr)s %(method)s %(path)r %(status)d %(dt_ms).1f ms",
    )
    shown_host = f"[{host}]" if ":" in host else host
    app.app.logger.info(
        "lab25-web %s on http://%s:%s, workers: %s, Redis: %s",
        setting("BUILD_VERSION", "dev"),
        shown_host,
        port,
        workers,
        where_redis_is,
    )
    # A forked worker shares the memory of its parent until one of them writes to it. The garbage
    # collector writes to every object, unless the object is frozen. With this line two workers
    # take 59 MiB together, without it 78 MiB.
    gc.freeze()
    server.run()


if __name__ == "__main__":
    main()
