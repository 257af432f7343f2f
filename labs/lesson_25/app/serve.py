"""The start in production: `python serve.py` checks the settings and serves app.py with granian.

granian starts worker processes, which answer the requests, and replaces a worker that dies. On
SIGTERM, the workers finish the requests in flight, then all processes exit, with status 0. A worker
that still runs after 5 s is killed.
"""

import multiprocessing
import socket
import sys

from granian import Granian
from granian.http import HTTP1Settings

from app import get_redis_client, limit_name_lookup, setting, whole_number

# Under load, 16 workers took 240 MB of memory and 230 threads. The Compose files and the stack file
# limit the service to 512 MB and 512 threads.
MAX_WORKERS = 16


def main():
    """Serve until a signal. Exit with one line if a setting cannot be used."""
    limit_name_lookup()
    try:
        host = setting("HOST", "127.0.0.1")
        port = whole_number("PORT", 8080, 1, 65535)
        workers = whole_number("WEB_CONCURRENCY", 2, 1, MAX_WORKERS)
        access_log = whole_number("ACCESS_LOG", 0, 0, 1)
        get_redis_client()  # raises ValueError if its settings cannot be used
        address = free_address(host, port)
    except ValueError as error:
        sys.exit(str(error))
    version = setting("BUILD_VERSION", "dev")
    place = f"{host} port {port}"
    print(f"lab25-web {version} on {place}, workers: {workers}", flush=True)

    # Forked workers have the same start_time, and share the memory of app.py. On macOS, and from
    # Python 3.14 on, the default is another method: each worker would import app.py again.
    multiprocessing.set_start_method("fork")
    Granian(
        "app:app",
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        # granian closes a connection if the headers of the next request take longer than this, in
        # ms. Load balancers close idle connections after 60 s. granian must not be the first, or a
        # request that a balancer has just sent would be lost.
        http1_settings=HTTP1Settings(header_read_timeout=75_000),
        backpressure=5_000,  # connections of each worker, most of them idle
        workers=workers,
        blocking_threads=8,  # requests at a time, in each worker
        respawn_failed_workers=True,
        workers_kill_timeout=5,  # seconds; Docker would kill all after 10
        log_level="error",  # hides granian's own messages, not those of app.py
        log_access=bool(access_log),
        # %r quotes the path, so that a line break in it cannot fake another line.
        log_access_format="%(time)s %(addr)s %(method)s %(path)r %(status)d %(dt_ms).1f ms",
    ).serve()


def free_address(host, port):
    """Return the IP address of this host, because granian accepts no name.

    Raise ValueError if the port is not free: two granians would share it without a warning.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return listener.getsockname()[0]
    except (OSError, TypeError, ValueError) as error:
        # TypeError and ValueError come from characters that no host name can have.
        raise ValueError(
            "HOST and PORT must be an address of this machine and a free port,"
            f" got {host!r} and {port}: {error}"
        ) from None


if __name__ == "__main__":
    main()
