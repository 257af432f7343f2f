"""The start in production: `python serve.py` checks the settings and serves app.py with granian.

granian starts worker processes, which answer the requests, and replaces a worker that dies. On
SIGTERM, the workers finish the requests in flight, then all processes exit, with status 0. A worker
that is just about to serve can miss the signal: granian kills it after workers_kill_timeout.
"""

import multiprocessing
import resource
import socket
import sys

from granian import Granian
from granian.http import HTTP1Settings

from app import get_redis_client, limit_name_lookup, setting, whole_number

# Under load, 16 workers took 240 MB of memory and 230 processes and threads. The stack files allow
# 512 of each.
MAX_WORKERS = 16

# Of each worker. Most connections are idle, because clients keep one for their next request.
MAX_CONNECTIONS = 5_000


def main():
    """Serve until a signal. Exit with one line if a setting cannot be used."""
    limit_name_lookup()
    try:
        host = setting("HOST", "127.0.0.1")
        port = whole_number("PORT", 8080, 1, 65535)
        workers = whole_number("WEB_CONCURRENCY", 2, 1, MAX_WORKERS)
        access_log = whole_number("ACCESS_LOG", 0, 0, 1)
        get_redis_client()  # checks the settings of Redis
        address = address_to_listen_on(host, port)
    except ValueError as error:
        sys.exit(str(error))
    version = setting("BUILD_VERSION", "dev")
    print(f"lab25-web {version} on {host} port {port}, workers: {workers}", flush=True)

    # Every connection is an open file, and some systems start a process with a limit of 256.
    _, highest_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(MAX_CONNECTIONS + 1_000, highest_limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, highest_limit))

    # Forked workers share start_time and memory with this process. Python 3.14 and macOS do not
    # fork unless they are told to.
    multiprocessing.set_start_method("fork")
    Granian(
        "app:app",
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        # An idle connection is closed after 75 s, later than by a load balancer, most of which take
        # 60 s. If we were first, the balancer could lose a request that it has just sent. The same
        # limit holds for the headers of a request.
        http1_settings=HTTP1Settings(header_read_timeout=75_000),  # ms
        backpressure=MAX_CONNECTIONS,
        workers=workers,
        blocking_threads=8,  # requests at a time, in each worker
        respawn_failed_workers=True,
        workers_kill_timeout=5,  # seconds; longer than Redis takes (3.5), and Docker waits for 10
        log_level="error",  # for granian's own messages
        log_access=access_log == 1,
        # %r, so that no path can look like a second line.
        log_access_format="%(time)s %(addr)s %(method)s %(path)r %(status)d %(dt_ms).1f ms",
    ).serve()


def address_to_listen_on(host, port):
    """Return the IP address of this host. Raise ValueError if its port cannot be listened on.

    granian requires an IP address, and shares a port with another granian without a warning. So
    this function looks up the host, and listens on the port for a moment.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return listener.getsockname()[0]
    except (OSError, TypeError, ValueError) as error:
        # TypeError and ValueError: no host has such a name.
        raise ValueError(
            "HOST and PORT must be an address of this machine and a free port,"
            f" got {host!r} and {port}: {error}"
        ) from None


if __name__ == "__main__":
    main()
