"""The stack on three nodes: engines in containers, whose addresses this machine must reach.

The tests that kill a node come first, while the two tasks of web are on different nodes.
"""

import contextlib
import http.client
import random
import string

import pytest

from harness.clients import FAILURES, Visitors, ask, counted, eventually
from harness.engine import BASE, REDIS, RUN, build, docker, give_image
from harness.swarm import STACK_FILE, adapted, engines, kernel_lacks, wait_for_engine

pytestmark = pytest.mark.swarm

STACK, SECRET = "lab25", "redis_password"
OWNER = "some-owner"
NETWORK = f"{RUN}-swarm"
PASSWORD = f" hush {string.punctuation} é "
SECONDS = 180  # Swarm needs at most 40 for anything here on a quiet machine

# Images, as lines after FROM.
TURNS_UNHEALTHY = """
import json, sys, urllib.request
answer = json.load(urllib.request.urlopen("http://127.0.0.1:8080/health"))
sys.exit(answer["uptime_seconds"] >= 8)
"""
IMAGES = {
    "first": "ENV BUILD_VERSION=first",
    "second": "ENV BUILD_VERSION=second",
    "never-healthy": 'CMD ["sleep", "99"]',
    "unhealthy-after-8-seconds": "COPY unhealthy.py /\n"
    "HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --start-interval=0.25s "
    'CMD ["python", "/unhealthy.py"]',
}


def get_from_any(nodes, path="/"):
    """Return the Answer of a random node that accepts a connection. Raise one of FAILURES."""
    for node in random.sample(nodes, len(nodes)):
        with contextlib.closing(http.client.HTTPConnection(node, 8080, timeout=1)) as connection:
            with contextlib.suppress(OSError):  # a killed node does not even refuse
                connection.connect()
            if connection.sock:
                connection.sock.settimeout(5)
                return ask(connection, path)
    raise ConnectionRefusedError("by each node")


class Travelers(Visitors):
    """Visitors who try the other nodes if one accepts no connection. Each request has its own."""

    def __init__(self, swarm):
        super().__init__(8080, count=4, pause=0.02)
        self.swarm = swarm

    def _visit(self):
        while not self._stop.wait(self.pause):
            try:
                self.answers.append(get_from_any(self.swarm.addresses))
            except FAILURES as error:
                self.failures.append(error)

    def count_on(self):
        """Wait until 50 more hits are counted."""
        enough = self.count() + 50
        eventually(lambda: self.count() >= enough, SECONDS, broken="hits are not counted")


@contextlib.contextmanager
def under_load(swarm, lost):
    """Send requests before, during and after a `with` block. Yield the Travelers.

    Fail if a number was given twice, or more than `lost` requests failed.
    """
    with Travelers(swarm) as travelers:
        travelers.count_on()
        yield travelers
        travelers.count_on()
    failed = travelers.failures
    assert len(failed) <= lost, f"{len(failed)} requests were lost, the first: {failed[:3]}"
    failed.clear()
    travelers.numbers()


class Swarm:
    """Three nodes: the first is the manager, the second has Redis."""

    def __init__(self, nodes, lacks):
        self.nodes = nodes
        self.manager, self.redis_node, _ = nodes
        self.addresses = [node.address(NETWORK) for node in nodes]
        # A task that stops may close a connection that it has not read. The routing mesh knows
        # earlier and would use another task. Without it, so many are not lost by the stack.
        self.closed_unread = 2 if "IPVS" in lacks else 0

    def docker(self, *arguments):
        return self.manager.run("docker", *arguments).stdout

    def deploy(self, tag):
        variables = [f"--env=IMAGE_TAG={tag}", f"--env=GHCR_OWNER={OWNER}"]
        deploy = ["docker", "stack", "deploy", "--with-registry-auth", "--detach=true"]
        stack = ["--compose-file", "/files/docker-stack.yml", STACK]
        docker("exec", *variables, self.manager.name, *deploy, *stack)

    def ended_update(self):
        """Return how the newest update ended, or None before it has ended."""
        template = "{{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}"
        state = self.docker("service", "inspect", "--format", template, f"{STACK}_web").strip()
        return state if state in {"completed", "paused", "rollback_completed"} else None

    def tasks(self, service):
        """Return a (node, container ID) for each healthy task. A stopped node has none."""
        names = ["--filter", f"name={STACK}_{service}", "--filter", "health=healthy"]
        listing = ["docker", "ps", "--quiet", *names]
        return [
            (node, task)
            for node in self.nodes
            for task in node.run(*listing, check=False).stdout.split()
        ]

    def settled(self):
        return [len(self.tasks(service)) for service in ("web", "redis")] == [2, 1]

    def runs(self, version):
        """Return whether the stack is settled and each task of web has this version."""
        shown = [
            node.run("docker", "exec", task, "printenv", "BUILD_VERSION", check=False).stdout
            for node, task in self.tasks("web")
        ]
        return shown == [f"{version}\n"] * 2 and self.settled()

    @contextlib.contextmanager
    def killed(self, node):
        """Kill a node in a `with` block, then start it and wait until the stack is settled."""
        docker("kill", node.name)
        try:
            yield
        finally:
            docker("start", node.name)
            wait_for_engine(node)
        eventually(
            lambda: self.settled() and counted(get_from_any(self.addresses)),
            SECONDS,
            broken="no hit counts although the killed node is back",
        )


@pytest.fixture(scope="module")
def swarm(image, registry, tmp_path_factory):
    """The stack on three nodes, settled, from a registry that requires a login."""
    folder = tmp_path_factory.mktemp("swarm")
    (folder / "unhealthy.py").write_text(TURNS_UNHEALTHY)
    for tag, lines in IMAGES.items():
        dockerfile = folder / "Dockerfile"
        dockerfile.write_text(f"FROM {image}\n{lines}\n")
        built = build(f"swarm-{tag}", "--file", dockerfile, context=folder)
        registry.push(built, registry.name(OWNER, tag))
    lacks = kernel_lacks(BASE)
    stack_file = adapted(STACK_FILE.read_text(), lacks, published=8080)
    (folder / "docker-stack.yml").write_text(stack_file)
    (folder / "password").write_text(PASSWORD)
    options = ["--env=REGISTRY=registry:5000", f"--volume={folder}:/files:ro"]
    with engines(3, NETWORK, registry, *options) as nodes:
        made = Swarm(nodes, lacks)
        give_image(REDIS, made.redis_node, folder)
        made.docker("swarm", "init")
        token = made.docker("swarm", "join-token", "--quiet", "worker").strip()
        for node in nodes[1:]:
            node.run("docker", "swarm", "join", "--token", token, f"{made.manager.name}:2377")
        hostname = made.redis_node.inspect()["Config"]["Hostname"]
        made.docker("node", "update", "--label-add", f"{STACK}.redis=true", hostname)
        made.docker("secret", "create", SECRET, "/files/password")
        made.docker("login", "registry:5000", *registry.account)
        made.deploy("first")
        eventually(lambda: made.runs("first"), SECONDS, broken="the first deploy does not finish")
        yield made


def test_password_is_required_and_shown_nowhere(swarm):
    node, task = swarm.tasks("redis")[0]
    refused = node.run("docker", "exec", task, "redis-cli", "ping").stdout
    assert "NOAUTH" in refused, f"Redis answers without a password: {refused}"
    shown = swarm.docker("service", "inspect", f"{STACK}_web", f"{STACK}_redis")
    for holder, name in swarm.tasks("web") + swarm.tasks("redis"):
        processes = "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ"
        shown += holder.run("sh", "-c", processes, check=False).stdout
        for look in ("inspect", "logs"):
            shown += holder.run("docker", look, name).stdout
    assert "redis-server" in shown
    place = shown.find("hush")
    assert place < 0, f"the password is shown: {shown[place - 200 : place + 40]!r}"


def test_killed_node_loses_only_its_own_requests(swarm):
    node = next(node for node, _ in swarm.tasks("web") if node is not swarm.manager)
    # The processes of the node exit one after the other.
    with under_load(swarm, lost=8), swarm.killed(node):
        eventually(
            lambda: len(swarm.tasks("web")) == 2,
            SECONDS,
            broken="the task of web on the killed node is not replaced",
        )


def test_counter_continues_after_redis_node_was_killed(swarm):
    with under_load(swarm, lost=8) as travelers, swarm.killed(swarm.redis_node):
        # It stays down until web notices, like a machine that has to boot.
        eventually(lambda: get_from_any(swarm.addresses).json["redis_error"], SECONDS)
    highest = max(travelers.numbers())
    number = eventually(lambda: counted(get_from_any(swarm.addresses)))
    assert number > highest, f"hit {highest} was answered, and {number} followed"


def test_update_under_load_loses_no_request(swarm):
    with under_load(swarm, lost=swarm.closed_unread):
        swarm.deploy("second")
        eventually(lambda: swarm.runs("second"), SECONDS, broken="the update does not finish")


@pytest.mark.parametrize("bad", ["never-healthy", "unhealthy-after-8-seconds"])
def test_bad_image_is_rolled_back_without_lost_request(swarm, bad):
    good = get_from_any(swarm.addresses, "/health").json["version"]
    with under_load(swarm, lost=swarm.closed_unread):
        swarm.deploy(bad)
        ended = eventually(swarm.ended_update, SECONDS, broken="the update does not end")
        assert ended == "rollback_completed", f"{bad} is not rolled back, but {ended}"
        eventually(lambda: swarm.runs(good), SECONDS, broken="the old version does not run")
