"""The production entry point: `python serve.py` checks the settings and serves app.py with granian.

granian starts worker processes and replaces one that dies. On SIGTERM, the workers finish the
requests in flight, and all processes exit with status 0.
"""

import multiprocessing
import socket
import sys

from granian import Granian
from granian.http import HTTP1Settings

from app import get_redis_client, setting, whole_number


def main():
    """Serve until a signal ends the process. Exit with one line if a setting is invalid."""
    try:
        host = setting("HOST", "127.0.0.1")
        port = whole_number("PORT", 8080, 1, 65535)
        # Under load, 16 workers use half of the 512 MB that the Compose files allow.
        workers = whole_number("WEB_CONCURRENCY", 2, 1, 16)
        access_log = whole_number("ACCESS_LOG", 0, 0, 1)
        get_redis_client()  # raises ValueError if its settings are invalid
        address = check_port_and_resolve(host, port)
    except ValueError as error:
        sys.exit(str(error))
    print(f"lab25-web starts on {host} port {port}", flush=True)

    # Forked workers inherit start_time from this process. With another method, each worker would
    # import app.py again and set its own. macOS and Python 3.14 have another default.
    multiprocessing.set_start_method("fork")
    Granian(
        "app:app",
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        # This is also granian's keep-alive, in ms. It must be longer than that of a load balancer,
        # usually 60 s, which could send a request on a connection that granian is closing.
        http1_settings=HTTP1Settings(header_read_timeout=75_000),
        backpressure=5_000,  # connections that a worker holds, most of them idle
        workers=workers,
        blocking_threads=8,  # concurrent requests in each worker
        respawn_failed_workers=True,
        workers_kill_timeout=5,  # s; longer than the 4.5 s that a request may wait for Redis
        log_level="error",  # hides what granian logs about itself, not what app.py logs
        log_access=bool(access_log),
        # %r quotes the path, so that a line break in it cannot fake another line.
        log_access_format="%(time)s %(addr)s %(method)s %(path)r %(status)d %(dt_ms).1f ms",
    ).serve()


def check_port_and_resolve(host, port):
    """Return the IP address of the host, because granian accepts no name.

    Raise ValueError if the port is taken, because granian would silently share it.
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
