"""The start in production: `python serve.py` checks the settings, then serves app.py by granian.

granian starts worker processes, which answer the requests, and replaces one that dies. On SIGTERM
the workers finish the requests that they have begun, then all exit, with status 0. A worker misses
a signal that comes just before it serves, and is killed after workers_kill_timeout.
"""

import logging
import multiprocessing
import resource
import socket
import sys

from granian import Granian
from granian.http import HTTP1Settings

from app import app, get_redis_client, limit_name_lookup, setting, whole_number

# Under load 16 workers took 240 MB and 230 processes, threads included: the stacks allow 512 each.
MAX_WORKERS = 16

# Of one worker. Most of them are idle: clients keep a connection for their next request.
MAX_CONNECTIONS = 5_000


def main():
    """Serve until a signal. Exit with one line if a setting cannot be used."""
    limit_name_lookup()
    try:
        host = setting("HOST", "127.0.0.1")
        port = whole_number("PORT", 8080, 1, 65535)
        workers = whole_number("WEB_CONCURRENCY", 2, 1, MAX_WORKERS)
        access_log = whole_number("ACCESS_LOG", 0, 0, 1)
        get_redis_client()
        address = free_address(host, port)
    except ValueError as error:
        sys.exit(str(error))

    log_format = "%(asctime)s %(process)d %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=log_format)
    version = setting("BUILD_VERSION", "dev")
    app.logger.info("lab25-web %s on %s port %s, workers: %s", version, host, port, workers)

    # A connection is an open file, and a process may start with a limit of 256 of them.
    _, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(MAX_CONNECTIONS + 1_000, highest), highest))

    # Forked workers share the memory and the start_time of this process. Python 3.14 and macOS
    # would start them in another way.
    multiprocessing.set_start_method("fork")
    Granian(
        "app:app",
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        http1_settings=HTTP1Settings(
            # How long an idle connection is kept, in ms. A load balancer may keep it for 60 s, and
            # lose the request that it then sends. Headers that take longer are cut off, too.
            header_read_timeout=75_000,
        ),
        backpressure=MAX_CONNECTIONS,
        workers=workers,
        blocking_threads=8,  # of one worker; all of them may be waiting for Redis
        respawn_failed_workers=True,
        workers_kill_timeout=5,  # seconds; Docker waits for 10
        log_level="error",  # of granian's own messages
        log_access=access_log == 1,
        log_access_format="%(time)s %(addr)s %(method)s %(path)r %(status)d %(dt_ms).1f ms",
    ).serve()


def free_address(host, port):
    """Return the IP address of this host. Raise ValueError if nothing can listen there.

    granian requires an IP address, and shares a port with another granian without a warning. So
    this function looks up the name, and listens on the port for a moment.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return listener.getsockname()[0]
    except (OSError, TypeError, ValueError) as error:  # the last two: no host has such a name
        raise ValueError(
            "HOST and PORT must be an address of this machine and a free port,"
            f" got {host!r} and {port}: {error}"
        ) from None


if __name__ == "__main__":
    main()
