"""The local stack: what surrounds the two containers, and the counter through everything that happens to them."""

import itertools
import shutil
import signal
import subprocess
import time

import pytest

from clients import Visitors, eventually
from engine import LESSON, RUN, Stack, docker, kill, local_stack
from limits import MEMORY_LIMITS_BYTES, PROCESS_LIMITS

pytestmark = pytest.mark.engine


@pytest.fixture(params=["web", "redis"])
def service(request):
    return request.param


# What surrounds them


def test_counts_up_by_one_and_both_are_healthy(stack):
    first = stack.hits()
    assert [stack.get().json["hit_count"] for _ in range(3)] == [first + 1, first + 2, first + 3]
    assert stack.get("/health").json["redis_ok"] is True
    assert {service: stack.container(service).health for service in ("web", "redis")} == {
        "web": "healthy",
        "redis": "healthy",
    }


def test_runs_without_privileges(stack, service):
    """Looks at the running process, since a file can promise what the engine does not do."""
    made = stack.container(service)
    status = dict(
        line.split(":\t", 1) for line in made.run("cat", "/proc/1/status").stdout.splitlines() if ":\t" in line
    )
    uids = set(status["Uid"].split())
    assert uids == ({"10001"} if service == "web" else {"999"})
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


def test_cannot_write_to_its_root(stack, service):
    made = stack.container(service)
    for folder in ("/", "/tmp", "/usr/local"):
        result = made.run("sh", "-c", f"echo > {folder}/written", check=False)
        assert result.returncode != 0 and "Read-only" in result.stderr


def test_runs_within_limits(stack, service):
    made = stack.container(service)
    limits = made.inspect()["HostConfig"]
    assert limits["Memory"] == MEMORY_LIMITS_BYTES[service]
    assert limits["PidsLimit"] == PROCESS_LIMITS[service]
    seen = made.run(
        "sh", "-c", "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
    ).stdout
    assert int(seen) == MEMORY_LIMITS_BYTES[service]


def test_publishes_the_web_on_loopback_only(stack):
    ports = stack.container("web").inspect()["NetworkSettings"]["Ports"]
    assert ports == {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]}
    assert not any(stack.container("redis").inspect()["NetworkSettings"]["Ports"].values())


def test_redis_can_be_reached_from_its_own_network_alone(stack, image):
    address = stack.container("redis").address(stack.network)
    program = f"import socket; socket.create_connection(('{address}', 6379), timeout=2)"
    outcomes = {
        name: docker("run", "--rm", "--network", name, image, "python", "-c", program, check=False).returncode
        for name in (stack.network, "bridge")
    }
    assert outcomes == {stack.network: 0, "bridge": 1}


def test_writes_every_hit_to_the_disk(stack):
    redis = stack.container("redis")
    settings = redis.run("redis-cli", "config", "get", "append*").stdout.split()
    pairs = dict(zip(settings[::2], settings[1::2], strict=True))
    assert (pairs["appendonly"], pairs["appendfsync"]) == ("yes", "always")


# The counter


def test_the_count_survives_down_and_goes_with_the_volume(image, tmp_path):
    with local_stack(tmp_path, image) as stack:
        stack.up()
        assert [stack.hits() for _ in range(3)] == [1, 2, 3]
        stack.down()
        stack.up()
        assert stack.hits() == 4
        stack.down("--volumes")
        stack.up()
        assert stack.hits() == 1


def test_a_killed_redis_comes_back_with_every_answered_hit(stack):
    """Under load: no number twice, none answered and then lost."""
    redis = stack.container("redis").name
    with Visitors(stack.port) as visitors:
        for _ in range(2):
            time.sleep(1)
            kill(redis)
        time.sleep(3)
    answered = list(itertools.chain(*visitors.numbers()))
    assert len(answered) == len(set(answered)) > 100
    after = stack.hits()
    assert after > max(answered)
    assert stack.container("redis").inspect()["RestartCount"] == 2


def test_watch_brings_a_saved_change_into_the_running_container(tmp_path):
    shutil.copytree(LESSON / "app", tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(LESSON / "compose", tmp_path / "compose")
    stack = Stack(tmp_path, tmp_path / "compose" / "docker-compose.yml", web=f"    image: {RUN}:watch\n")
    files = [word for file in stack.files for word in ("--file", file)]
    try:
        stack.up("--build")
        command = ["docker", "compose", "--project-name", stack.project, *files, "watch", "--no-up"]
        log = tmp_path / "watch.log"
        with (
            log.open("w") as output,
            subprocess.Popen(command, env=stack.environment, stdout=output, stderr=subprocess.STDOUT) as watch,
        ):
            try:
                eventually(lambda: "Watch enabled" in log.read_text(), 20)
                source = tmp_path / "app" / "app.py"
                source.write_text(source.read_text().replace("Hello from lab25", "Hello, changed"))
                eventually(lambda: stack.get().json["message"] == "Hello, changed", 20)
            finally:
                watch.send_signal(signal.SIGINT)
                watch.wait(20)
    finally:
        stack.down("--volumes")
