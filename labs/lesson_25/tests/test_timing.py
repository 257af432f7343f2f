"""Limits in seconds and bytes, which a busy machine can miss: run them with nothing else."""

import contextlib
import http.client
import resource
import socket
import subprocess
import sys
import time

import pytest

from harness import PROJECT, limits
from harness.clients import ask
from harness.engine import container, inspect

pytestmark = pytest.mark.timing

CPU_OF = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""


def test_benchmark_rows_keep_their_limits():
    command = [sys.executable, PROJECT / "bench" / "bench.py", "--seconds=2"]
    result = subprocess.run(command, capture_output=True, text=True)
    missed = [row for row in result.stdout.splitlines() if "missed" in row]
    assert result.returncode == 0, "\n".join(missed) or result.stderr


def test_startup_and_health_check_need_little_cpu(image):
    health_check = inspect(image, "image")["Config"]["Healthcheck"]["Test"][1:]
    commands = {
        "startup": (["python", "-c", "import serve"], limits.STARTUP_CPU_SECONDS),
        "health check": (health_check, limits.HEALTH_CHECK_CPU_SECONDS),
    }
    with container(image, "--read-only") as web:
        for name, (command, limit) in commands.items():
            runs = [float(web.run("python", "-c", CPU_OF, *command).stdout) for _ in range(10)]
            assert min(runs) < limit, f"the {name} takes {min(runs):.2f} s of CPU"


def test_idle_and_unfinished_connections_delay_no_answer(image):
    _, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
    options = ["--env", "WEB_CONCURRENCY=1", "--memory", str(limits.MEMORY_LIMITS_BYTES["web"])]
    with contextlib.ExitStack() as cleanup, container(image, *options) as web:
        address = web.address(), 8080  # the engine's proxy holds fewer connections
        for _ in range(200):
            unfinished = cleanup.enter_context(socket.create_connection(address, timeout=5))
            unfinished.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Unfinished: ")
        for _ in range(limits.IDLE_CONNECTIONS):
            idle = cleanup.enter_context(
                contextlib.closing(http.client.HTTPConnection(*address, timeout=20))
            )
            assert ask(idle, "/health").status == 200
        waits = []
        for _ in range(20):
            started = time.monotonic()
            assert web.get("/health").status == 200
            waits.append(time.monotonic() - started)
        memory = web.memory_bytes()
        assert ask(idle, "/health").status == 200, "an idle connection was closed"
    assert max(waits) < limits.AT_ONCE_SECONDS, f"an answer took {max(waits):.2f} s"
    assert memory < limits.IDLE_CONNECTIONS_MEMORY_BYTES, f"{memory / 2**20:.0f} MiB"
