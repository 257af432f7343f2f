"""The start: `python serve.py` checks the settings, then serves app.py until it is told to end."""

import signal

# What ends the service: docker stop, Ctrl-C, a closed terminal.
END_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

if __name__ == "__main__":
    # Before the other imports, which take 0.3 s. A blocked signal waits until wait_for_the_end
    # takes it. Process 1 of a container would never see one that it neither blocks nor handles.
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)

import functools
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
import time
import urllib.parse

from granian import Granian
from granian.http import HTTP1Settings

import app
import watch
from app import MAX_DB, setting, whole_number

MAX_WORKERS = 16  # what the stacks' limits on processes and memory hold under load

# A kept connection without a request stays open longer than load balancers keep theirs (60 s):
# one that the app closes first costs them a request. An unfinished request may take as long.
IDLE_SECONDS = 75

# Connections that a worker holds at once, idle ones too. 4,000 idle ones took 91 MiB.
MAX_CONNECTIONS = 5_000

THREADS = 8  # in each worker, as many requests may wait when Redis freezes; with 6 it is 4 % slower
KILL_SECONDS = 5  # for a request that a client never finishes; Docker itself kills after ten

LOG_FORMAT = {"format": "%(asctime)s %(process)d %(levelname)s %(message)s"}
LOGGING = {
    "formatters": {"generic": LOG_FORMAT, "access": LOG_FORMAT},
    "root": {"handlers": ["console"], "level": "INFO"},
}


# --- Where Redis is: what can be checked without a connection

# Any other option of an address could take away the time limits that every client is made with.
URL_OPTIONS = {
    "db",
    "username",
    "password",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
    "ssl_check_hostname",
}


def check_redis():
    """Return where Redis is, in words for the log.

    Raises ValueError, with a sentence for the user, where a setting cannot be used. No sentence
    shows a part of REDIS_URL, REDIS_HOST or REDIS_PASSWORD: any part may be a password.
    """
    refuse_both("REDIS_HOST", "REDIS_URL")
    refuse_both("REDIS_PASSWORD", "REDIS_PASSWORD_FILE")
    host = setting("REDIS_HOST")
    url = setting("REDIS_URL")
    if not host and not url:
        return "none, no counter"
    if app.redis is None:
        return f"none, no counter ({app.why_the_counter_is_off()})"
    if host:
        check_redis_host(host)
    else:
        check_redis_url(url)
    connection = unconnected(app.make_redis_client())
    if hasattr(connection, "path"):  # a socket in the file system
        return connection.path
    return f"{connection.host}:{connection.port}/{connection.db}"


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


def check_redis_url(url):
    """Raise ValueError where REDIS_URL cannot be used."""
    problem = problem_of_url(url)
    if problem:
        raise ValueError(
            f"REDIS_URL cannot be used: {problem}. It must look like"
            " redis://USER:PASSWORD@HOST:6379/0, rediss://… (TLS) or unix:///PATH"
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
        host.encode("idna")
    except UnicodeError:
        return "between its dots there is nothing, or more than 63 characters"
    return None


def problem_of_url(url):
    """Return what is wrong with an address, or None.

    redis-py reads it. The checks are for what redis-py would take without a word, and what then
    would fail later, or lead to another Redis or another database than was meant.
    """
    if not url.startswith(("redis://", "rediss://", "unix://")):
        return "it begins with none of redis://, rediss:// and unix://"
    if "#" in url:
        return "it has a #, which must be written %23"
    try:
        client = app.client_for_url(url)
        parts = urllib.parse.urlsplit(url)
        port = parts.port  # raises ValueError where it is none
    except ValueError:
        return (
            "its port or the value of an option cannot be read"
            " (in a password, write / as %2F, ? as %3F and @ as %40)"
        )
    if parts.scheme == "unix":
        problem = None if parts.path else "it names no socket"
    else:
        problem = problem_of_place(parts.hostname, port, parts.path)
    return problem or problem_of_options(client, parts)


def problem_of_place(host, port, path):
    """Return what is wrong with these parts of an address, or None."""
    if not host:
        return "it names no host"
    if problem := problem_of_host(urllib.parse.unquote(host)):
        return f"its host is none: {problem}"
    if port == 0:
        return "its port is not from 1 to 65535"
    if not re.fullmatch("/?[0-9]*", path):
        return "what stands after the host is no number of a database"
    return None


def problem_of_options(client, parts):
    """Return what is wrong with what stands after the ? of an address, or None.

    `client` is made from the address, and `parts` are what urllib takes it apart to.
    """
    given = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    names = {name for name, _ in given}
    values = {value for _, value in given}
    if not names <= URL_OPTIONS:
        return f"it has an option that is none of {', '.join(sorted(URL_OPTIONS))}"
    if "" in values:
        return "it has an option without a value"
    if parts.scheme != "rediss" and any(name.startswith("ssl_") for name in names):
        return "it has an option for TLS, which needs rediss://"
    if app.redis_password() and (parts.password or "password" in names):
        return "it has a password, and another one is set: unset one of them"
    try:
        connection = unconnected(client)
    except Exception:
        return "an option has a value that redis-py does not take"
    if not 0 <= connection.db <= MAX_DB:
        return f"its database is not from 0 to {MAX_DB}"
    if parts.scheme == "rediss":
        return problem_of_tls_files(connection)
    return None


def unconnected(client):
    """Return a connection of this client that is made, which checks its options, and not open."""
    pool = client.connection_pool
    return pool.connection_class(**pool.connection_kwargs)


def problem_of_tls_files(connection):
    """Return what is wrong with the files for TLS that a connection names, or None."""
    try:
        context = ssl.create_default_context(cafile=connection.ca_certs)
        if connection.certfile or connection.keyfile:
            # Without a password here OpenSSL would ask for one at the terminal.
            context.load_cert_chain(connection.certfile, connection.keyfile, password="")
    except (OSError, TypeError):
        return "a file that it names cannot be read, or holds no certificate or no key"
    return None


# --- Where to listen


def check_address(host, port):
    """Return the IP address to listen at. Raises ValueError where nobody can listen there."""
    family = {}
    if ":" in host:
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    try:
        # The server itself would share a port that is taken, and takes no host name.
        with socket.create_server((host, port), **family) as free:
            return free.getsockname()[0]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"HOST is {host!r} and PORT is {port}: {error};"
            " set an address and a free port of this machine"
        ) from None


def allow_open_files(count):
    """Raise the limit on open files, of which every connection is one, as far as is allowed."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now < count:
        limit = count if most == resource.RLIM_INFINITY else min(count, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


# --- The server: its end is the difficult part


class Server(Granian):
    """Granian, with an end that is told to the parent alone and always arrives.

    How the service ends:

    1. An end signal reaches the parent, or its whole group, or each process (as from docker
       stop, a terminal, systemd). All threads of all processes block it, so that no handler
       interrupts anything. One thread of the parent takes it: wait_for_the_end.
    2. That thread wakes granian's main loop, which calls shutdown here.
    3. shutdown tells granian that the workers end because of their parent. One that ends
       without that counts as crashed: it would be started again, and the exit status be 1.
    4. shutdown closes the pipe to the workers. It closes by itself when the parent is killed.
    5. A thread of each worker, wait_for_the_parent, sees that. From then on every answer closes
       its connection; granian answers what is in flight, and the worker ends.
    6. granian waits for the workers, kills after KILL_SECONDS, and the parent exits with 0.

    Of granian's inner names it relies on wrks, interrupt_by_parent, signal_handler_interrupt
    and shutdown, as they are in 2.8.7, and on the handler that a worker sets for SIGTERM.
    """

    def __init__(self, **settings):
        super().__init__("app:app", **settings)
        self.workers_end, self.parents_end = multiprocessing.Pipe(duplex=False)

    def run(self):
        """Serve until the end. Exits with status 0 after an end signal."""
        expected = set(END_SIGNALS)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # started by nohup
            expected.remove(signal.SIGHUP)
        threading.Thread(target=wait_for_the_end, args=[self, expected], daemon=True).start()
        loader = functools.partial(
            app_in_worker, app.start_time, self.workers_end, self.parents_end
        )
        self.serve(target_loader=loader, wrap_loader=False)
        sys.exit(0)

    def shutdown(self, exit_code=0):
        for worker in self.wrks:
            worker.interrupt_by_parent = True
        self.parents_end.close()
        super().shutdown(exit_code)


def wait_for_the_end(server, end_signals):
    """Wait for one of these signals, then have the server end.

    It is for a thread of its own. granian's handlers run in the main thread, and set an event
    for which that thread may be waiting with the event's lock in its hand: it then waits for
    itself, for ever.
    """
    signal.sigwait(end_signals)
    server.signal_handler_interrupt()


def app_in_worker(start_time, workers_end, parents_end):
    """Return the app to granian in a new worker process, with what belongs to one."""
    parents_end.close()  # the pipe ends when the parent's own copy is closed
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    app.start_time = start_time
    ending = threading.Event()

    @app.app.after_request
    def close_the_connection_at_the_end(response):
        # A client that keeps asking on a connection accepted just now would delay the end.
        if ending.is_set():
            response.headers["Connection"] = "close"
        return response

    inherited = signal.getsignal(signal.SIGTERM)
    threading.Thread(
        target=wait_for_the_parent, args=[workers_end, inherited, ending], daemon=True
    ).start()
    if app.get_redis_client() is not None:
        app.watch = watch.Watch()
        app.watch.start()
    return app.app


def wait_for_the_parent(workers_end, inherited, ending):
    """Wait until the parent ends, then end this worker as granian does at a SIGTERM."""
    workers_end.poll(None)
    while signal.getsignal(signal.SIGTERM) is inherited:  # granian has not set its own yet
        time.sleep(0.01)
    ending.set()
    end = signal.getsignal(signal.SIGTERM)
    end(signal.SIGTERM, None)


def main():
    """Check the settings and serve. Exits with one line for a setting that cannot be used."""
    try:
        host = setting("HOST", "127.0.0.1")
        port = whole_number("PORT", 8080, 1, 65535)
        workers = whole_number("WEB_CONCURRENCY", 2, 1, MAX_WORKERS)
        access_log = whole_number("ACCESS_LOG", 0, 0, 1)
        redis_place = check_redis()
        address = check_address(host, port)
    except ValueError as error:
        sys.exit(str(error))

    allow_open_files(MAX_CONNECTIONS + 1_000)
    # The C library would look for a name for ten seconds; see app.WAIT_SECONDS.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    server = Server(
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        http1_settings=HTTP1Settings(
            header_read_timeout=IDLE_SECONDS * 1000,
            max_buffer_size=65_536,
        ),
        backpressure=MAX_CONNECTIONS,
        workers=workers,
        blocking_threads=THREADS,
        respawn_failed_workers=True,
        workers_kill_timeout=KILL_SECONDS,
        log_level="error",
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
        redis_place,
    )
    gc.freeze()  # a collection in one worker would unshare the memory of all: 78 MiB, not 59
    server.run()


if __name__ == "__main__":
    main()
