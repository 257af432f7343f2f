"""The start: `python serve.py` checks the settings, then serves app.py until it is told to end.

It needs a Unix system. The server is granian: a parent process, and worker processes that answer
the requests. Each worker is forked from the parent, or, where Python does not fork (macOS, and
Linux from Python 3.14 on), imports the modules anew.
"""

import ending

if __name__ == "__main__":
    # From here on the system keeps these signals until call_at_end_signal, below, takes one. This
    # comes before the other imports, which take 0.3 s: in a container, where this is process 1,
    # Linux would throw away a signal that comes meanwhile.
    ending.block_end_signals()

import gc
import multiprocessing
import multiprocessing.resource_tracker
import os
import resource
import sys
from functools import partial

from granian import Granian
from granian.http import HTTP1Settings

import app
from app import setting, whole_number
from checks import check_address, check_redis, host_and_port
from watch import CircuitBreaker

# With 16 workers the service stays within the limits on processes and memory that the Compose
# files set, also under load.
MAX_WORKERS = 16

# Requests that one worker works on at the same time. All of them may be waiting for Redis.
# With 6 threads the service answers 4 % fewer requests a second.
THREADS = 8

# Connections that one worker holds at the same time. Most of them are idle ones, kept by clients
# for their next request. 4,000 idle connections take about 50 MiB.
MAX_CONNECTIONS = 5_000

# An idle connection is closed after this time. It must be longer than load balancers keep one
# (60 s): if the service closes it first, a request is lost. A client that sends the headers of a
# request more slowly than this is cut off, too.
IDLE_SECONDS = 75

# At the end, a request may take this time before its worker is killed. Docker waits for 10 s.
KILL_SECONDS = 5

# granian adds this to its own configuration of Python's logging. There, "console" is a handler,
# "generic" is the format of messages, and "access" that of the access log.
LOG_FORMAT = {"format": "%(asctime)s %(process)d %(levelname)s %(message)s"}
LOGGING = {
    "formatters": {"generic": LOG_FORMAT, "access": LOG_FORMAT},
    "root": {"handlers": ["console"], "level": "INFO"},  # for the app's messages
}


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
    server = Server(
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        http1_settings=HTTP1Settings(
            header_read_timeout=IDLE_SECONDS * 1000,  # ms
            max_buffer_size=65_536,  # bytes, for the headers of a request
        ),
        backpressure=MAX_CONNECTIONS,  # of each worker
        workers=workers,
        blocking_threads=THREADS,
        respawn_failed_workers=True,
        workers_kill_timeout=KILL_SECONDS,
        log_level="error",  # for granian's own messages
        log_dictconfig=LOGGING,
        log_access=access_log == 1,
        log_access_format="%(addr)s %(method)s %(path)r %(status)d %(dt_ms).1f ms",
    )
    # The server has just set up the log.
    app.app.logger.info(
        "lab25-web %s on http://%s, workers: %s, Redis: %s",
        setting("BUILD_VERSION", "dev"),
        host_and_port(host, port),
        workers,
        where_redis_is,
    )
    # A forked worker shares the memory of its parent until one of them writes to it. The garbage
    # collector writes to every object, unless the object is frozen. With this line two workers
    # take 59 MiB together, without it 78 MiB.
    gc.freeze()
    server.run()


def allow_open_files(count):
    """Let this process and its workers open so many files, or as many as the system allows.

    A connection is an open file, and some systems start with a limit of 256.
    """
    limit, highest_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= count:
        return
    if highest_limit != resource.RLIM_INFINITY:
        count = min(count, highest_limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, highest_limit))


class Server(Granian):
    """granian, with another way to end. Its steps are described in ending.py.

    This class uses inner names of granian 2.8.7: `wrks`, `interrupt_by_parent`, `shutdown` and
    `signal_handler_interrupt`. If a new version changes them, the tests of the end fail
    (test_start.py).
    """

    def __init__(self, **settings):
        # granian wants the name of the app, though load_app, below, returns the app itself.
        super().__init__("app:app", **settings)
        self.pipe_reader, self.pipe_writer = multiprocessing.Pipe(duplex=False)

    def run(self):
        """Serve until an end signal. Exits with status 1 if workers crash again and again."""
        if multiprocessing.get_start_method() != "fork":
            start_resource_tracker()
        # Step 2 of the end. granian's function sets a flag, and wakes the main loop. If an end
        # signal has come already, that loop finds the flag when it begins.
        ending.call_at_end_signal(self.signal_handler_interrupt)
        # granian calls this function in every new worker, and serves the app that it returns.
        load = partial(load_app, app.start_time, self.pipe_reader, self.pipe_writer)
        self.serve(target_loader=load, wrap_loader=False)

    def shutdown(self, exit_code=0):
        """Have the workers end, and wait for them. granian's main loop calls it (step 2)."""
        for worker in self.wrks:
            worker.interrupt_by_parent = True  # or granian takes its end for a crash
        self.pipe_writer.close()  # the workers begin with step 3
        # Step 5. granian also sends the workers a SIGTERM, which they block.
        super().shutdown(exit_code)


def start_resource_tracker():
    """Start a process that Python's multiprocessing needs where it does not fork.

    multiprocessing would start it with the first worker. Each time it has started it, it unblocks
    SIGINT and SIGTERM in the thread that called for it, which here is the parent's main thread.
    """
    multiprocessing.resource_tracker.ensure_running()
    ending.block_end_signals()


def load_app(start_time, pipe_reader, pipe_writer):
    """Make a new worker ready, and return the app that it serves."""
    ending.end_with_parent(pipe_reader, pipe_writer)
    app.app.after_request(ending.close_connection_if_ending)
    app.start_time = start_time  # the parent's
    if app.get_redis_client():  # where Redis is configured; not connected yet
        app.breaker = CircuitBreaker()
        app.breaker.start_watch()
    return app.app


if __name__ == "__main__":
    main()
