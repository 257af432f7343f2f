"""The local stack: what surrounds the two containers, and the counter through everything that happens to them."""

import itertools
import re
import shutil
import signal
import subprocess
import time

import pytest

from harness import PROJECT
from harness.clients import Visitors, eventually
from harness.engine import LOCAL_FILE, RUN, kill, local_stack
from harness.limits import MEMORY_LIMITS_BYTES, PROCESS_LIMITS

pytestmark = pytest.mark.engine


# What surrounds them


def test_counts_up_by_one_and_both_are_healthy(stack):
    first = stack.hits()
    assert [stack.get().json["hit_count"] for _ in range(3)] == [first + 1, first + 2, first + 3]
    assert stack.get("/health").json["redis_ok"] is True
    assert {stack.container(service).health for service in ("web", "redis")} == {"healthy"}


@pytest.mark.parametrize(("service", "uid"), [("web", "10001"), ("redis", "999")])
def test_runs_without_privileges_within_limits(stack, service, uid):
    """Looks at the running process, since a file can promise what the engine does not do."""
    made = stack.container(service)
    status = made.run("cat", "/proc/1/status").stdout
    assert set(re.search(r"Uid:(.*)", status)[1].split()) == {uid}
    assert set(re.findall(r"Cap\w+:\t(\w+)", status)) == {"0" * 16}
    assert re.search(r"NoNewPrivs:\t(.*)", status)[1] == "1"
    for folder in ("/", "/tmp", "/usr/local"):
        assert "Read-only" in made.run("sh", "-c", f"echo > {folder}/written", check=False).stderr
    limits = made.inspect()["HostConfig"]
    assert (limits["Memory"], limits["PidsLimit"]) == (
        MEMORY_LIMITS_BYTES[service],
        PROCESS_LIMITS[service],
    )
    files = (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    )  # of either version of cgroups
    seen = made.run("sh", "-c", f"cat {files[0]} 2>/dev/null || cat {files[1]}").stdout
    assert int(seen) == MEMORY_LIMITS_BYTES[service]


def test_publishes_the_web_on_loopback_only(stack):
    ports = stack.container("web").inspect()["NetworkSettings"]["Ports"]
    assert ports == {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]}
    assert not any(stack.container("redis").inspect()["NetworkSettings"]["Ports"].values())


def test_writes_every_hit_to_the_disk(stack):
    said = stack.container("redis").run("redis-cli", "config", "get", "append*").stdout
    assert "appendonly\nyes\n" in said and "appendfsync\nalways\n" in said


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


def test_watch_brings_a_saved_change_into_the_running_container(context, tmp_path):
    shutil.copytree(PROJECT / "compose", tmp_path / "compose")
    with local_stack(tmp_path, f"{RUN}:watch", tmp_path / "compose" / LOCAL_FILE.name) as stack:
        stack.up("--build")
        command = stack.command("watch", "--no-up")
        log = tmp_path / "watch.log"
        with (
            log.open("w") as out,
            subprocess.Popen(command, env=stack.environment, stdout=out, stderr=out) as watch,
        ):
            try:
                eventually(lambda: "Watch enabled" in log.read_text(), 20)
                source = context / "app.py"
                source.write_text(source.read_text().replace("Hello from lab25", "Hello, changed"))
                eventually(lambda: stack.get().json["message"] == "Hello, changed", 20)
            finally:
                watch.send_signal(signal.SIGINT)
