"""The server: its settings, checked, its start and its end. `python app.py` runs it."""

import os
import signal

for early in signal.SIGINT, signal.SIGTERM:  # until the server has handlers of its own
    signal.signal(early, lambda *_: os._exit(0))

import functools
import gc
import multiprocessing
import socket
import sys
import threading
import time

from granian import Granian
from granian.http import HTTP1Settings

import app
from app import number, setting

FORMAT = {"format": "%(asctime)s %(process)d %(levelname)s %(message)s"}
LOGGING = {
    "formatters": {"generic": FORMAT, "access": FORMAT},
    "root": {"handlers": ["console"], "level": "INFO"},
}


class Server(Granian):
    """Ends its workers by closing a pipe, or by dying: a signal to their whole group would reach some before itself."""

    def shutdown(self, *exit_code):
        for worker in self.wrks:
            worker.interrupt_by_parent = (
                True  # or its end would be an unexpected one, and the status 1
            )
        self.pipe[1].close()
        super().shutdown(*exit_code)


def in_worker(start_time, parent, parents_end):
    """Return the app to a new worker process."""
    parents_end.close()
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    threading.Thread(
        target=end_with, args=[parent, signal.getsignal(signal.SIGTERM)], daemon=True
    ).start()
    app.start_time = start_time
    return app.app


def end_with(parent, handler):
    """Wait for the end of the pipe, then end this worker as a SIGTERM does: what is in flight is answered."""
    parent.poll(None)
    while signal.getsignal(signal.SIGTERM) is handler:  # the server has not set its own yet
        time.sleep(0.01)
    # A connection accepted just now is not told to end, and a client that keeps asking would keep it for five seconds.
    app.app.after_request_funcs[None] = [
        lambda answer: answer.headers.set("Connection", "close") or answer
    ]
    signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)


def main():
    """Check the environment and serve until SIGTERM. Exits with one line for a value that cannot be used."""
    try:
        host, port = setting("HOST", "127.0.0.1"), number("PORT", 8080, 1, 65535)
        workers, access_log = number("WEB_CONCURRENCY", 2, 1, 64), number("ACCESS_LOG", 0, 0, 1)
        redis_at = app.redis_address()
    except ValueError as error:
        sys.exit(str(error))
    try:  # the server shares a port that is taken, and takes no host names
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if ":" in host else {}
        with socket.create_server((host, port), **family) as free:
            address = free.getsockname()[0]
    except (OSError, TypeError, ValueError) as error:
        sys.exit(
            f"HOST is {host!r} and PORT is {port}: {error}; set an address and a free port of this machine"
        )

    os.environ.setdefault(
        "RES_OPTIONS", "timeout:1 attempts:1"
    )  # the C library looks up a name for ten seconds
    server = Server(
        "app:app",
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        http1_settings=HTTP1Settings(header_read_timeout=10_000, max_buffer_size=65_536),
        workers=workers,
        blocking_threads=8,  # as many may wait a second when Redis freezes; with 6 it is 4 % slower, with 10 5 % faster
        respawn_failed_workers=True,
        workers_kill_timeout=5,  # seconds, for a client that never finishes its request; Docker kills after ten
        log_level="error",
        log_dictconfig=LOGGING,
        log_access=access_log == 1,
        log_access_format="%(addr)s %(method)s %(path)r %(status)d %(dt_ms).1f ms",
    )
    server.pipe = multiprocessing.Pipe(duplex=False)
    if hasattr(
        signal, "SIGHUP"
    ):  # not on Windows; the server would take a closed terminal for a reload
        server.on_startup(
            functools.partial(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP))
        )
    version, at = (
        setting("BUILD_VERSION", "dev"),
        f"http://{f'[{host}]' if ':' in host else host}:{port}",
    )
    shown = redis_at and (
        redis_at.get("unix_socket_path") or "{host}:{port}/{db}".format(**redis_at)
    )
    app.app.logger.info(
        "lab25-web %s on %s, workers: %s, Redis: %s",
        version,
        at,
        workers,
        shown or "none, no counter",
    )
    gc.freeze()  # a collection in one worker would unshare the memory of all: 78 MiB instead of 59
    sys.exit(
        server.serve(
            target_loader=functools.partial(in_worker, app.start_time, *server.pipe),
            wrap_loader=False,
        )
    )
