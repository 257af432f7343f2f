"""The start in production: `python serve.py` checks the settings and serves app.py with granian.

granian is a parent process and its workers, which answer the requests. It replaces a worker that
dies. On SIGTERM the workers finish the requests in flight, then all processes exit, with status 0.
A worker that gets the signal just before it can serve misses it, and is killed after 5 s.
"""

import multiprocessing
import resource
import socket
import sys

from granian import Granian
from granian.http import HTTP1Settings

from app import get_redis_client, limit_name_lookup, setting, whole_number

# With 16 workers under load, the service took 240 MB of memory and 230 processes and threads. The
# stack files limit it to 512 MB and 512.
MAX_WORKERS = 16

# A worker holds at most this many connections. Most are idle, kept for a client's next request.
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

    # A connection is an open file, and some systems start a process with a limit of 256 files.
    # 1,000 are for all else.
    _, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(MAX_CONNECTIONS + 1_000, highest), highest))

    # granian starts a worker as multiprocessing is told to. A fork shares the memory and start_time
    # of this process. On macOS, and from Python 3.14 on, it is not the default.
    multiprocessing.set_start_method("fork")
    Granian(
        "app:app",
        address=address,
        port=port,
        interface="wsgi",
        http="1",
        # How long an idle connection is kept open, in ms. A load balancer sends requests on one for
        # 60 s, and a request that meets its end is lost. Slow headers get the same time.
        http1_settings=HTTP1Settings(header_read_timeout=75_000),
        backpressure=MAX_CONNECTIONS,
        workers=workers,
        blocking_threads=8,  # requests that a worker handles at a time
        respawn_failed_workers=True,
        workers_kill_timeout=5,  # seconds; Docker kills all processes after 10
        log_level="error",  # for granian's own messages
        log_access=access_log == 1,
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
    except (OSError, TypeError, ValueError) as error:  # not OSError: characters of no host name
        raise ValueError(
            "HOST and PORT must be an address of this machine and a free port,"
            f" got {host!r} and {port}: {error}"
        ) from None


if __name__ == "__main__":
    main()
