"""The stacks on one machine: what surrounds the containers, and the counter through faults."""

import contextlib
import re
import shutil
import string
import time

import pytest
import yaml

from harness import PROJECT
from harness.clients import Visitors, counted, eventually
from harness.engine import (
    RUN,
    Stack,
    build,
    container,
    docker,
    local_stack,
    redis_in,
)
from harness.limits import MEMORY_LIMITS_BYTES, PROCESS_LIMITS

pytestmark = pytest.mark.engine

REGISTRY_FILE = PROJECT / "compose" / "docker-compose.registry.yml"
STACK_FILE = PROJECT / "compose" / "docker-stack.yml"
OWNER = RUN  # so its images are removed with those of this run


# The local stack


def test_counter_counts_up_in_healthy_stack(stack):
    first = stack.hits()
    assert [stack.get().json["hit_count"] for _ in range(3)] == [first + 1, first + 2, first + 3]
    assert stack.get("/health").json["redis_ok"] is True
    for service in ("web", "redis"):
        health = stack.container(service).inspect()["State"]["Health"]["Status"]
        assert health == "healthy", f"{service} is {health} after `up --wait`"


@pytest.mark.parametrize(("service", "uid"), [("web", "10001"), ("redis", "999")])
def test_service_runs_without_privileges_within_limits(stack, service, uid):
    """Checks the running processes, since an engine may ignore what a file sets."""
    made = stack.container(service)
    statuses = made.run("sh", "-c", "cat /proc/[0-9]*/status", check=False).stdout
    uids = set(re.findall(r"Uid:\t(\d+)\t(\d+)", statuses))
    assert uids == {(uid, uid)}, f"{service} runs as {uids}"
    capabilities = set(re.findall(r"Cap\w+:\t(\w+)", statuses))
    assert capabilities == {"0" * 16}, f"{service} has capabilities: {capabilities}"
    assert set(re.findall(r"NoNewPrivs:\t(\d)", statuses)) == {"1"}, (
        f"{service} can gain privileges"
    )
    for folder in ("/", "/tmp", "/usr/local"):
        written = made.run("sh", "-c", f"echo > {folder}/written", check=False)
        assert "Read-only" in written.stderr, f"{service} can write to {folder}: {written}"
    limits = made.inspect()["HostConfig"]
    assert limits["Memory"] == MEMORY_LIMITS_BYTES[service], f"{service}: {limits['Memory']}"
    assert limits["PidsLimit"] == PROCESS_LIMITS[service], f"{service}: {limits['PidsLimit']}"


def test_acknowledged_hits_survive_crashes_of_redis(stack):
    redis = stack.container("redis")

    def count_on():
        enough = visitors.count() + 100
        eventually(lambda: visitors.count() > enough, broken="hits are not counted again")

    def crash():  # `docker kill` would prevent the restart
        redis.run("sh", "-c", "kill -9 -1", check=False)

    with Visitors(stack.port, pause=0.01) as visitors:
        count_on()
        crash()
        count_on()
        docker("restart", redis.name)
        count_on()
        crash()
        count_on()
    highest = max(visitors.numbers())
    after = stack.hits()
    assert after > highest, f"the counter went back: {after} after {highest}"
    restarts = redis.inspect()["RestartCount"]  # since `docker restart`
    assert restarts == 1, f"Redis crashed once and was restarted {restarts} times"


def test_maximum_workers_lose_no_request_within_limits(image, tmp_path):
    """With a limit of 128 processes, 16 workers lost a fifth of the requests."""
    web = "    environment:\n      WEB_CONCURRENCY: 16\n"
    with local_stack(tmp_path, image, web) as stack:
        stack.up()
        made = stack.container("web")
        with Visitors(stack.port, count=150) as visitors:
            eventually(lambda: visitors.count() >= 900)
        visitors.numbers()
        docker("stop", made.name)
        state = made.inspect()["State"]
        assert state["ExitCode"] == 0, f"web stopped with {state['ExitCode']}:\n{made.log()}"
        assert not state["OOMKilled"], "web reached its memory limit"


# The registry file, on a machine that has no other file


@pytest.fixture
def published(registry, tmp_path):
    """The Stack of the registry file, which deploys `dev` from the registry of the tests."""
    machine = tmp_path / "machine"
    machine.mkdir()
    made = Stack(tmp_path, shutil.copy(REGISTRY_FILE, machine))
    made.environment |= registry.logged_in
    made.environment |= {"REGISTRY": registry.address, "GHCR_OWNER": OWNER}
    yield made
    made.down("--volumes")


def up_and_check(stack, version, hit):
    """Start a stack. Fail unless this version runs and the counter continues."""
    stack.up()
    shown = stack.get("/health").json["version"]
    assert shown == version, f"version {version} was deployed, {shown} runs"
    assert (number := stack.hits()) == hit, f"hit {hit} has the number {number}"


def test_newer_image_is_pulled_and_digest_goes_back(registry, published, image):
    name = registry.name(OWNER, "dev")
    old = registry.push(image, name)
    registry.push(build("newer", "--build-arg", "BUILD_VERSION=newer"), name)
    docker("tag", image, name)  # the machine still has the old image
    up_and_check(published, "newer", hit=1)
    published.environment["IMAGE_TAG"] = f"dev@{old}"
    up_and_check(published, "0a1b2c3", hit=2)


# Redis with a password, as the stack file and the password overlay start it


@contextlib.contextmanager
def redis_with_password(password, folder):
    """Yield the Container of a Redis that reads this password, its health check included."""
    (folder / "redis_password").write_text(password)
    folder.chmod(0o755)  # Redis reads it as another user
    redis = yaml.safe_load(STACK_FILE.read_text())["services"]["redis"]
    command = [word.replace("$$", "$") for word in redis["command"]]
    options = ["--user=redis", "--read-only", "--cap-drop=ALL", "--init"]
    options += ["--volume", f"{folder}:/run/secrets:ro"]
    with container(redis["image"], *options, command=command, wait=False) as made:
        made.health_check = redis["healthcheck"]["test"][1:]
        yield made


@pytest.mark.parametrize("password", ["", "two\nlines\n"], ids=["empty", "two-lines"])
def test_redis_rejects_password_file_without_one_line(password, tmp_path):
    with redis_with_password(password, tmp_path) as redis:
        eventually(
            lambda: redis.inspect()["State"]["Status"] == "exited",
            broken="Redis starts with a password file that has not exactly one line",
        )
        assert "must be a file with one line" in redis.log(), redis.log()


@pytest.mark.parametrize("password", [f" hush {string.punctuation} é ", "hush\n"])
def test_redis_requires_password_except_for_health_check(password, tmp_path):
    with redis_with_password(password, tmp_path) as redis:
        healthy = redis.wait_for(lambda: redis.run(*redis.health_check, check=False).stdout)
        assert healthy == "PONG\n", f"the health check failed: {healthy}"
        for client in (["redis-cli"], redis.health_check[:-1]):
            refused = redis.run(*client, "get", "lab25_hits", check=False)
            answer = refused.stdout + refused.stderr
            assert re.search("NOAUTH|NOPERM", answer), f"Redis needs no password: {answer}"
        secret = "/run/secrets/redis_password"
        authenticated = f"redis-cli --askpass ping <{secret}"
        answer = redis.run("sh", "-c", authenticated).stdout
        assert "PONG" in answer, f"Redis rejects the password of the file: {answer}"


# Web, without a stack


@pytest.mark.parametrize(
    "options", [[], ["--dns", "192.0.2.1"]], ids=["unknown-name", "silent-name-server"]
)
def test_unresolved_name_is_reported_until_redis_appears(image, network, options):
    options = ["--network", network, "--env", "REDIS_HOST=redis", *options]
    with container(image, *options) as web, Visitors(web.port, count=16, pause=0.05) as visitors:
        eventually(
            lambda: "redis:6379" in web.get().json["redis_error"],
            broken="redis_error does not name the address that cannot be resolved",
        )
        for _ in range(30):
            assert web.get("/health").status == 200
            time.sleep(0.05)
        with redis_in(network, "--network-alias", "redis"):
            eventually(lambda: counted(web.get()), broken="no hit counts though Redis appeared")
    visitors.numbers()


# Each of eight clients requests until it gets no answer. Prints how many hits were counted.
REQUEST_UNTIL_STOPPED = """
import concurrent.futures, json, sys, urllib.request

numbers = []

def request():
    try:
        while True:
            with urllib.request.urlopen(f"http://{sys.argv[1]}:8080/", timeout=15) as answer:
                numbers.append(json.load(answer)["hit_count"])
    except OSError:
        pass

with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for _ in range(8):
        pool.submit(request)
print(len(numbers))
"""


def test_sigterm_under_load_answers_each_counted_hit(image, network):
    with (
        redis_in(network, "--network-alias", "redis") as redis,
        container(image, "--network", network, "--env", "REDIS_HOST=redis") as web,
    ):
        eventually(lambda: counted(web.get()), broken="no hit counts")
        redis.run("redis-cli", "set", "lab25_hits", "0")

        def hits():
            return int(redis.run("redis-cli", "get", "lab25_hits").stdout)

        command = ["python", "-c", REQUEST_UNTIL_STOPPED, web.address(network)]
        with container(image, "--network", network, wait=False, command=command) as client:
            eventually(lambda: hits() > 100, broken="fewer than 100 hits are counted")
            docker("stop", web.name)
            status = web.inspect()["State"]["ExitCode"]
            assert status == 0, f"`docker stop` under load ended it with status {status}"
            docker("wait", client.name)
            answered = client.log()
        assert answered == f"{hits()}\n", f"{hits()} hits were counted, and answered: {answered}"
