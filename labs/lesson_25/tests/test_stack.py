"""The local stack: what surrounds its containers, and the counter through all that happens.

Then what the swarm's stack promises and needs no swarm to be seen.
"""

import contextlib
import http.client
import itertools
import os
import re
import shutil
import signal
import string
import subprocess

import pytest
import yaml

from harness import PROJECT
from harness.clients import NO_ANSWER_SECONDS, Visitors, ask, eventually, timed
from harness.engine import LOCAL_FILE, RUN, Stack, container, docker, kill, local_stack
from harness.limits import AT_ONCE_SECONDS, MEMORY_LIMITS_BYTES, PROCESS_LIMITS, STOP_SECONDS

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
    assert limits["Memory"] == MEMORY_LIMITS_BYTES[service], f"memory: {limits['Memory']}"
    assert limits["PidsLimit"] == PROCESS_LIMITS[service], f"processes: {limits['PidsLimit']}"
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
    assert "appendonly\nyes\n" in said, f"Redis writes no hit to its file: {said}"
    assert "appendfsync\nalways\n" in said, f"an answered hit may not be on the disk yet: {said}"


# The counter


def test_the_count_survives_down_and_goes_with_the_volume(image, tmp_path):
    with local_stack(tmp_path, image) as stack:
        stack.up()
        assert [stack.hits() for _ in range(3)] == [1, 2, 3]
        stack.down()
        stack.up()
        assert (hit := stack.hits()) == 4, f"after `down` and `up` hit 4 is number {hit}"
        volumes = ["volume", "ls", "--quiet", "--filter", f"name={stack.project}"]
        assert docker(*volumes).stdout, "the count is in no volume"
        stack.down("--volumes")
        assert not docker(*volumes).stdout, "`down --volumes` leaves the volume with the count"


def test_a_killed_redis_comes_back_with_every_answered_hit(stack):
    """With clients: no number twice, none answered and then lost."""
    redis = stack.container("redis")
    restarts = redis.inspect()["RestartCount"]
    with Visitors(stack.port, pause=0.01) as visitors:

        def count_on():
            enough = visitors.count() + 100
            eventually(lambda: visitors.count() > enough, broken="hits are not counted (again)")

        for _ in range(2):
            count_on()
            kill(redis.name)
        count_on()
    answered = list(itertools.chain(*visitors.numbers()))
    assert len(answered) == len(set(answered)), "a number was given twice"
    after = stack.hits()
    assert after > max(answered), f"the count went back: {after} after {max(answered)}"
    assert redis.inspect()["RestartCount"] == restarts + 2


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


# The limits


WORKERS_AT_MOST = 16


@pytest.fixture(scope="module")
def busiest_stack(image, tmp_path_factory):
    """The local stack with as many workers as are allowed; what it does to itself is a test's."""
    web = f"    image: {image}\n    environment:\n      WEB_CONCURRENCY: {WORKERS_AT_MOST}\n"
    made = Stack(tmp_path_factory.mktemp("busiest"), LOCAL_FILE, web=web)
    try:
        made.up()
        yield made
    finally:
        made.down("--volumes")


def test_the_most_workers_lose_no_request_within_the_limits_and_end_cleanly(busiest_stack):
    """Under 128 processes 16 workers lost a fifth of the requests, and had to be killed."""
    busiest_stack.up()
    web = busiest_stack.container("web")
    with Visitors(busiest_stack.port, count=150) as visitors:
        eventually(lambda: sum(map(len, visitors.answers)) >= 900)
    numbers = list(itertools.chain(*visitors.numbers()))
    assert len(numbers) == len(set(numbers)), "a number was given twice"
    docker("stop", web.name)
    state = web.inspect()["State"]
    assert state["ExitCode"] == 0, f"web ended with {state['ExitCode']}; its log:\n{web.log()}"
    assert not state["OOMKilled"], "web met its limit of memory"


@pytest.mark.timing
def test_the_most_workers_hold_4000_idle_connections_and_stop_at_once(busiest_stack):
    busiest_stack.up()
    web = busiest_stack.container("web")
    address = web.address(busiest_stack.network)
    with contextlib.ExitStack() as open_ones:
        for _ in range(4000):
            connection = http.client.HTTPConnection(address, 8080, timeout=NO_ANSWER_SECONDS)
            open_ones.callback(connection.close)
            ask(connection, "/health")
        memory = web.memory_bytes()
        assert memory < MEMORY_LIMITS_BYTES["web"] * 3 / 4, f"{memory / 2**20:.0f} MiB in use"
        new = http.client.HTTPConnection(address, 8080, timeout=NO_ANSWER_SECONDS)
        open_ones.callback(new.close)
        took = timed(ask, new, "/health")
        assert took < AT_ONCE_SECONDS, f"beside 4,000 idle connections an answer took {took:.2f} s"
    took = timed(docker, "stop", web.name)
    assert took < STOP_SECONDS, f"`docker stop` took {took:.2f} s"


# The swarm's stack, without a swarm


STACK_FILE = PROJECT / "compose" / "docker-stack.yml"


def test_the_swarms_stack_asks_whose_image_shall_run(tmp_path):
    """Where a default would run somebody else's image; it is read as a deploy reads it."""
    shutil.copy(STACK_FILE, tmp_path)
    (tmp_path / ".env").write_text("GHCR_OWNER=ignored\n")
    command = ["stack", "config", "--compose-file", STACK_FILE.name]
    environment = {key: value for key, value in os.environ.items() if key != "GHCR_OWNER"}
    for unset in ({}, {"GHCR_OWNER": ""}):
        refused = docker(*command, cwd=tmp_path, env={**environment, **unset}, check=False)
        assert refused.returncode, f"a stack without an owner is taken: {refused.stdout}"
        words = "required variable GHCR_OWNER is missing a value: the account"
        assert words in refused.stderr, f"the refusal does not name GHCR_OWNER: {refused.stderr}"
    taken = docker(*command, cwd=tmp_path, env={**environment, "GHCR_OWNER": "some-owner"})
    image = yaml.safe_load(taken.stdout)["services"]["web"]["image"]
    assert image == "ghcr.io/some-owner/lab25-web:dev"


@contextlib.contextmanager
def swarms_redis(secrets):
    """Yield the Container of a Redis as the stack file starts it, with a folder of secrets."""
    redis = yaml.safe_load(STACK_FILE.read_text())["services"]["redis"]
    command = [word.replace("$$", "$") for word in redis["command"]]
    hardening = ["--user=redis", "--read-only", "--cap-drop=ALL"]
    options = [*hardening, "--volume", f"{secrets}:/run/secrets:ro"]
    secrets.chmod(0o755)  # Redis reads them as another user
    with container(redis["image"], *options, command=command, wait=False) as made:
        docker("start", made.name)
        yield made


@pytest.mark.parametrize("secret", [None, "", "\n", "\r\n"], ids=["none", "empty", "LF", "CRLF"])
def test_the_swarms_redis_does_not_start_without_its_password(secret, tmp_path):
    if secret is not None:
        (tmp_path / "redis_password").write_text(secret)
    with swarms_redis(tmp_path) as redis:
        with contextlib.suppress(subprocess.TimeoutExpired):
            docker("wait", redis.name, timeout=20)
        state = redis.inspect()["State"]
        assert state["Status"] == "exited", f"Redis runs without a password; its log: {redis.log()}"
        assert state["ExitCode"] == 1, f"Redis ended with another status: {state}"
        assert "redis_password is empty or cannot be read" in redis.log(), redis.log()


@pytest.mark.parametrize("secret", [f" hush {string.punctuation} é ", "hush\n"])
def test_the_swarms_redis_wants_its_password(secret, tmp_path):
    (tmp_path / "redis_password").write_text(secret)
    with swarms_redis(tmp_path) as redis:
        redis.wait_for(lambda: "NOAUTH" in redis.run("redis-cli", "ping", check=False).stdout)
        file = "/run/secrets/redis_password"
        said = redis.run("sh", "-c", f"tr -d '\\n' <{file} | redis-cli --askpass ping").stdout
        assert "PONG" in said, f"the password of the secret is not taken: {said}"
        name = redis.run("cat", "/proc/1/comm").stdout.strip()
        assert name == "redis-server", f"process 1 is {name}, which hears SIGTERM in its place"
