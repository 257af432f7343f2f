"""The stack on three machines: engines in containers, whose addresses this machine must reach."""

import contextlib
import http.client
import itertools
import random
import re
import string
import subprocess

import pytest

from harness.clients import FAILURES, Visitors, ask, counted, eventually, timed
from harness.engine import BASE, REDIS, RUN, build, docker, give_image
from harness.limits import DEPLOY_SECONDS, MEMORY_LIMITS_BYTES, PROCESS_LIMITS
from harness.swarm import STACK_FILE, adapted, engine_in_container, kernel_lacks

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OWNER = "some-owner"
NETWORK = f"{RUN}-swarm"
PASSWORD = f" hush {string.punctuation} é "
SECONDS = 180  # for what Swarm has to do; half a minute where nothing else is to be done

# Versions, as lines on top of the image.
GOOD = {"first": "ENV BUILD_VERSION=first", "second": "ENV BUILD_VERSION=second"}
TURNS_UNHEALTHY = """
import json, sys, urllib.request
answer = json.load(urllib.request.urlopen("http://127.0.0.1:8080/health"))
sys.exit(answer["uptime_seconds"] >= 8)
"""
BAD = {
    "does-not-start": "ENV PORT=99999",
    "never-healthy": 'CMD ["sleep", "99"]',
    "ends-after-8-seconds": 'CMD ["timeout", "8", "python", "serve.py"]',
    "unhealthy-after-8-seconds": "COPY unhealthy.py /\n"
    "HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --start-interval=0.25s "
    'CMD ["python", "/unhealthy.py"]',
}


def get_from_any(nodes, path="/"):
    """Return the Answer of the first node that takes a connection, in any order.

    Raises one of FAILURES.
    """
    for node in random.sample(nodes, len(nodes)):
        with contextlib.closing(http.client.HTTPConnection(node, 8080, timeout=1)) as connection:
            with contextlib.suppress(OSError):  # a killed node does not even refuse
                connection.connect()
            if connection.sock:
                connection.sock.settimeout(5)
                return ask(connection, path)
    raise ConnectionRefusedError("by every node")


class Travellers(Visitors):
    """Visitors who ask another node where one takes no connection.

    Each request has a connection of its own.
    """

    def __init__(self, nodes):
        super().__init__(8080, count=4, pause=0.02)
        self.nodes = nodes

    def _visit(self, answers):
        while not self._stop.wait(self.pause):
            try:
                answers.append(get_from_any(self.nodes))
            except FAILURES as error:
                self.failures.append(error)

    def answered(self):
        return sum(map(len, self.answers))

    def different_numbers(self, lost=0):
        """Return what was handed out.

        Fail where a number came twice, or more than `lost` requests have no answer.
        """
        count = len(self.failures)
        assert count <= lost, f"{count} requests were lost, the first: {self.failures[:3]}"
        self.failures.clear()
        numbers = list(itertools.chain(*self.numbers()))
        assert len(numbers) == len(set(numbers)), "a number was given twice"
        assert len(numbers) > 20, f"only {len(numbers)} hits were counted"
        return numbers


class Swarm:
    """Three nodes: the first is the manager, the second has Redis."""

    def __init__(self, nodes, lacks):
        self.nodes = nodes
        self.lacks = lacks  # what the kernel has not
        # A task that ends may close a connection that it has not read. The mesh, which knows
        # earlier, would have sent it elsewhere; without the mesh so many are no loss of the stack.
        self.closed_unread = 2 if "IPVS" in lacks else 0
        self.manager, self.redis_node, self.worker = nodes
        self.addresses = [node.address(NETWORK) for node in nodes]

    def docker(self, *arguments, **options):
        return self.manager.run("docker", *arguments, **options).stdout

    def set_node(self, node, *option):
        self.docker("node", "update", *option, node.inspect()["Config"]["Hostname"])

    def deploy(self, tag, detach=True):
        """Deploy a tag; with `detach` false, until the command says how that ended."""
        variables = [f"--env=IMAGE_TAG={tag}", f"--env=GHCR_OWNER={OWNER}"]
        deploy = ["docker", "stack", "deploy", "--with-registry-auth", f"--detach={detach}".lower()]
        stack = ["--compose-file", "/docker-stack.yml", "lab25"]
        return docker("exec", *variables, self.manager.name, *deploy, *stack).stdout

    def tag(self):
        """Return the tag that runs, or will when Swarm is done."""
        image = "{{.Spec.TaskTemplate.ContainerSpec.Image}}"
        said = self.docker("service", "inspect", "--format", image, "lab25_web")
        return re.search(r"lab25-web:([\w-]+)", said)[1]

    def other_tag(self):
        return "second" if self.tag() == "first" else "first"

    def update_state(self):
        """Return what Swarm says of the last update or rollback; nothing where it was ended."""
        state = "{{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}"
        return self.docker("service", "inspect", "--format", state, "lab25_web").strip()

    def updating(self):
        return self.update_state() in {"updating", "rollback_started"}

    def tasks(self, service):
        """Return a (node, container ID) for each healthy task; a stopped node has none."""
        names = ["--filter", f"name=lab25_{service}", "--filter", "health=healthy"]
        listing = ["docker", "ps", "--quiet", *names]
        return [
            (node, task)
            for node in self.nodes
            for task in node.run(*listing, check=False).stdout.split()
        ]

    def settled(self):
        return [len(self.tasks(service)) for service in ("web", "redis")] == [2, 1]

    def versions(self):
        """Return the versions that answer."""
        return {get_from_any(self.addresses, "/health").json["version"] for _ in range(9)}

    def next_hit(self):
        return eventually(lambda: counted(get_from_any(self.addresses)), SECONDS)

    def has_every_node(self):
        listing = self.docker("node", "ls", "--format", "{{.Status}} {{.Availability}}")
        return listing.split() == ["Ready", "Active"] * 3

    def set_right(self):
        """Bring about what each test begins with, whatever was before it."""
        for node in self.nodes:
            if not node.inspect()["State"]["Running"]:
                docker("start", node.name)
            eventually(lambda node=node: not node.run("docker", "info", check=False).returncode, 60)
            self.set_node(node, "--availability", "active")
        eventually(self.has_every_node, SECONDS)
        if self.tag() not in GOOD:
            self.deploy("first")
        eventually(lambda: self.versions() == {self.tag()} and self.settled(), SECONDS)
        if self.updating():  # what is watched still would be rolled back for what a test does
            self.deploy(self.tag())
        eventually(lambda: not self.updating(), SECONDS)
        self.next_hit()

    def bring_web_to(self, node):
        """See to it that a node has one of the two tasks of web."""
        while node not in dict(self.tasks("web")):
            if self.manager in dict(self.tasks("web")):
                self.set_node(self.manager, "--availability", "drain")
                eventually(lambda: self.manager not in dict(self.tasks("web")), SECONDS)
                self.set_node(self.manager, "--availability", "active")
            else:  # both are on Redis' node
                self.docker("service", "update", "--force", "--detach", "lab25_web")
                eventually(lambda: len(dict(self.tasks("web"))) == 2, SECONDS)
            eventually(self.settled, SECONDS)


def publish(registry, image, folder):
    """Push each version of the image, good or bad."""
    (folder / "unhealthy.py").write_text(TURNS_UNHEALTHY)
    for tag, lines in {**GOOD, **BAD}.items():
        dockerfile = folder / "Dockerfile"
        dockerfile.write_text(f"FROM {image}\n{lines}\n")
        registry.push(build(f"swarm-{tag}", "--file", dockerfile, context=folder), OWNER, tag)


@pytest.fixture(scope="module")
def shared_swarm(image, registry, tmp_path_factory):
    """The stack on three nodes, from a registry that wants a login."""
    folder = tmp_path_factory.mktemp("swarm")
    publish(registry, image, folder)
    lacks = kernel_lacks(BASE)
    files = folder / "files"
    files.mkdir()
    stack_file = adapted(STACK_FILE.read_text(), lacks, published=8080)
    (files / "docker-stack.yml").write_text(stack_file)
    (files / "password").write_text(PASSWORD)
    options = ["--network", NETWORK, "--env=REGISTRY=registry:5000"]
    dockerd = ["dockerd", "--insecure-registry", "registry:5000"]
    with contextlib.ExitStack() as cleanup:
        docker("network", "create", NETWORK)
        cleanup.callback(docker, "network", "rm", NETWORK)
        docker("network", "connect", "--alias", "registry", NETWORK, registry.container)
        cleanup.callback(docker, "network", "disconnect", NETWORK, registry.container)
        nodes = [
            cleanup.enter_context(engine_in_container(*options, command=dockerd)) for _ in range(3)
        ]
        made = Swarm(nodes, lacks)
        docker("cp", f"{files}/.", f"{made.manager.name}:/")
        give_image(REDIS, made.redis_node, folder)
        made.docker("swarm", "init")
        token = made.docker("swarm", "join-token", "--quiet", "worker").strip()
        for node in nodes[1:]:
            node.run("docker", "swarm", "join", "--token", token, f"{made.manager.name}:2377")
        made.set_node(made.redis_node, "--label-add", "lab25.redis=true")
        made.docker("secret", "create", "redis_password", "/password")
        login = ["login", "registry:5000", "--username", registry.user]
        made.docker(*login, "--password", registry.password)
        made.deploy("first")
        yield made


@pytest.fixture
def swarm(shared_swarm):
    """The stack on three nodes, two web tasks of a good version and Redis; every node is there."""
    shared_swarm.set_right()
    return shared_swarm


def test_every_node_answers_for_two_tasks_and_hits_travel_encrypted(swarm, image):
    if swarm.lacks:
        lacks = " and ".join(swarm.lacks)
        pytest.xfail(f"this kernel lacks {lacks}")
    sniff = (
        "import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 8)\n"
        "while s.recv(99)[9] != 50: pass"
    )
    options = ["--network", f"container:{swarm.redis_node.name}", "--user=0", "--cap-add=NET_RAW"]
    statuses = [get_from_any([address]).status for address in swarm.addresses]
    assert statuses == [200, 200, 200], f"not every node answers: {statuses}"
    with Travellers(swarm.addresses) as travellers:
        try:
            docker("run", "--rm", *options, image, "python", "-c", sniff, timeout=60)
        except subprocess.TimeoutExpired:
            pytest.fail("hits do not travel encrypted: no ESP packet came to Redis in a minute")
    travellers.different_numbers()


@pytest.mark.parametrize(
    ("service", "program", "uid"), [("web", "python", "10001"), ("redis", "redis-server", "999")]
)
def test_the_program_is_process_1_without_privileges_within_limits(swarm, service, program, uid):
    node, task = swarm.tasks(service)[0]
    status = node.run("docker", "exec", task, "cat", "/proc/1/status").stdout
    name = re.search(r"Name:\t(.*)", status)[1]
    assert name == program, f"process 1 of {service} is {name}, which hears SIGTERM in its place"
    assert set(re.search(r"Uid:(.*)", status)[1].split()) == {uid}, status
    assert set(re.findall(r"Cap\w+:\t(\w+)", status)) == {"0" * 16}, status
    written = node.run("docker", "exec", task, "touch", "/tmp/written", check=False)
    assert "Read-only" in written.stderr, f"{service} can write: {written}"
    limits = "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}"
    said = node.run("docker", "inspect", "--format", limits, task).stdout
    assert said.split() == [str(MEMORY_LIMITS_BYTES[service]), str(PROCESS_LIMITS[service])]


def test_the_password_is_wanted_and_shown_nowhere(swarm):
    """Holds Redis up, so that its health check is there long enough to be looked at."""
    node, task = swarm.tasks("redis")[0]
    said = node.run("docker", "exec", task, "redis-cli", "ping").stdout
    assert "NOAUTH" in said, f"Redis answers without the password: {said}"
    look = f"""
        redis=$(docker inspect --format '{{{{.State.Pid}}}}' {task})
        kill -STOP $redis
        for try in $(seq 300); do
            grep -qs '[r]edis-cli' /proc/[0-9]*/cmdline && break
            sleep 0.1
        done
        cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ
        kill -CONT $redis"""
    told = node.run("sh", "-c", look, check=False).stdout
    assert "redis-cli\0--askpass" in told, "no health check was met in half a minute"
    for holder, name in swarm.tasks("web") + swarm.tasks("redis"):
        for looking in ("inspect", "logs"):
            told += holder.run("docker", looking, name).stdout
    told += swarm.docker("service", "inspect", "lab25_web", "lab25_redis")
    place = told.find("hush")
    assert place < 0, f"the password is shown: {told[place - 200 : place + 40]!r}"


def test_an_update_under_load_loses_no_request(swarm):
    tag = swarm.other_tag()
    with Travellers(swarm.addresses) as travellers:
        swarm.deploy(tag)
        eventually(lambda: swarm.versions() == {tag} and swarm.settled(), SECONDS)
    travellers.different_numbers(lost=swarm.closed_unread)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_image_is_rolled_back_and_the_old_one_answers_all_along(swarm, bad):
    """Also one that is healthy at first: Swarm watches it as long as the file says."""
    good = swarm.tag()
    with Travellers(swarm.addresses) as travellers:
        swarm.deploy(bad)
        eventually(lambda: swarm.tag() == good or swarm.update_state() == "completed", SECONDS)
        assert swarm.tag() == good, f"{bad} was not rolled back: Swarm takes it for good"
        eventually(lambda: swarm.settled() and not swarm.updating(), SECONDS)
    travellers.different_numbers(lost=swarm.closed_unread)
    assert swarm.versions() == {good}


@pytest.mark.timing
def test_a_good_deploy_ends_within_a_minute(swarm):
    tag = swarm.other_tag()
    took = timed(swarm.deploy, tag, detach=False)
    assert swarm.versions() == {tag}
    assert took < DEPLOY_SECONDS, f"the deploy of a good version took {took:.0f} s"


def test_a_drained_node_loses_no_request(swarm):
    swarm.bring_web_to(swarm.worker)
    with Travellers(swarm.addresses) as travellers:
        swarm.set_node(swarm.worker, "--availability", "drain")
        eventually(
            lambda: swarm.settled() and swarm.worker not in dict(swarm.tasks("web")), SECONDS
        )
    travellers.different_numbers(lost=swarm.closed_unread)


def test_a_killed_node_costs_only_the_requests_on_it(swarm):
    swarm.bring_web_to(swarm.worker)
    with Travellers(swarm.addresses) as travellers:
        docker("kill", swarm.worker.name)
        eventually(swarm.settled, SECONDS)
    travellers.different_numbers(lost=8)  # its processes end one after the other


def test_the_count_goes_on_with_every_answered_hit_when_redis_node_was_killed(swarm):
    with Travellers(swarm.addresses) as travellers:
        eventually(lambda: travellers.answered() > 100, SECONDS)
        docker("kill", swarm.redis_node.name)
        # As a machine that boots; the others take long to notice one that is back at once.
        eventually(lambda: get_from_any(swarm.addresses).json["hit_count"] is None, SECONDS)
        docker("start", swarm.redis_node.name)
        swarm.next_hit()
    answered = max(travellers.different_numbers(lost=8))
    number = swarm.next_hit()
    assert number > answered, f"hit {answered} was answered, and then came {number}"
