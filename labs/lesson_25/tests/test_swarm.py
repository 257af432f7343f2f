"""The stack on three machines: engines in containers, whose addresses this machine must reach, as Linux does."""

import contextlib
import http.client
import itertools
import random
import re
import string
import time

import pytest

from harness import PROJECT
from harness.clients import FAILURES, Visitors, ask, counted, eventually
from harness.engine import REDIS, RUN, build, container, docker

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NETWORK = f"{RUN}-swarm"
PASSWORD = f" hush {string.punctuation} é "
OTHERS = {
    "second": "ENV BUILD_VERSION=second",
    "bad-port": "ENV PORT=99999",
    "never-healthy": 'CMD ["sleep", "99"]',
}
NEEDS = {  # what the file needs of the kernel: the lines, and what stands in their place where the kernel has it not
    "IPVS": (
        '- "${LAB25_PORT:-8080}:8080"',
        '- {target: 8080, published: "${LAB25_PORT:-8080}", mode: host}',
    ),
    "ESP": ('    driver_opts:\n      encrypted: "true"\n', ""),
}
# Asks the kernel by netlink for IPVS and for an association with ESP, which loads their modules; prints what it lacks.
KERNEL = """import socket, struct
def lacks(protocol, message):
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    kernel.send(struct.pack("=IHHII", 16 + len(message), 16, 5, 0, 0) + message)
    kind, error = struct.unpack_from("=H10xi", kernel.recv(4096), 4)
    return kind == 2 and error != 0
layout, here, all_bits = "=56x16s2xBxB3x16s32s84xHBBB7xHH64sI16x", bytes([127, 0, 0, 1]), b"\\xff" * 32
association = struct.pack(layout, here, 1, 50, here, all_bits, 2, 0, 0, 0, 88, 2, b"cbc(aes)", 128)
print("IPVS" * lacks(16, struct.pack("=BBHHH8s", 3, 1, 0, 9, 2, b"IPVS")), "ESP" * lacks(6, association))
"""


def kernel_lacks(image):
    """Return the names of what the kernel has not, of NEEDS."""
    return docker(
        "run", "--rm", "--user=0", "--cap-add=NET_ADMIN", image, "python", "-c", KERNEL
    ).stdout.split()


def get_from_any(nodes, path="/"):
    """Return the Answer of the first node that takes a connection, in any order. Raises one of FAILURES."""
    for node in random.sample(nodes, len(nodes)):
        with contextlib.closing(http.client.HTTPConnection(node, 8080, timeout=1)) as connection:
            with contextlib.suppress(OSError):  # a killed node does not even refuse
                connection.connect()
            if connection.sock:
                connection.sock.settimeout(5)
                return ask(connection, path)
    raise ConnectionRefusedError("by every node")


class Travellers(Visitors):
    """Visitors who ask another node where one takes no connection; each request has a connection of its own."""

    def __init__(self, nodes):
        super().__init__(8080, count=4, pause=0.02)
        self.nodes = nodes

    def _visit(self, answers):
        while not self._stop.wait(self.pause):
            try:
                answers.append(get_from_any(self.nodes))
            except FAILURES as error:
                self.failures.append(error)

    def different_numbers(self, lost=0):
        """Return what was handed out; fail where a number came twice, or more than `lost` requests have no answer."""
        assert len(self.failures) <= lost, self.failures[:3]
        self.failures.clear()
        numbers = list(itertools.chain(*self.numbers()))
        assert len(numbers) == len(set(numbers)) > 20
        return numbers


class Swarm:
    """Three nodes: the first is the manager, the second has Redis. `lacks` names what the kernel has not."""

    def __init__(self, nodes, lacks):
        self.nodes, self.lacks = nodes, lacks
        self.manager, self.redis_node, self.worker = nodes
        self.addresses = [node.address(NETWORK) for node in nodes]

    def docker(self, *arguments):
        return self.manager.run("docker", *arguments).stdout

    def set_node(self, node, *option):
        self.docker("node", "update", *option, node.inspect()["Config"]["Hostname"])

    def deploy(self, tag):
        """Deploy a tag and return what that prints: the exit status is 0 also where it was rolled back."""
        command = (
            "docker stack deploy --with-registry-auth --detach=false -c /docker-stack.yml lab25"
        )
        return docker(
            *["exec", "--env", f"IMAGE_TAG={tag}", "--env=GHCR_OWNER=vlrrbn"],
            *[self.manager.name, *command.split()],
        ).stdout

    def tasks(self, service):
        """Return a (node, container ID) for each of the service's healthy tasks; a stopped node has none."""
        listing = [
            "docker",
            "ps",
            "--quiet",
            "--filter",
            f"name=lab25_{service}",
            "--filter",
            "health=healthy",
        ]
        return [
            (node, name)
            for node in self.nodes
            for name in node.run(*listing, check=False).stdout.split()
        ]

    def settled(self):
        return [len(self.tasks(service)) for service in ("web", "redis")] == [2, 1]

    def next_hit(self):
        return eventually(lambda: counted(get_from_any(self.addresses)), 60)


@pytest.fixture(scope="module")
def swarm(image, registry, tmp_path_factory):
    """The stack on three nodes, from a registry that wants a login; shared, and left settled by each test."""
    folder = tmp_path_factory.mktemp("swarm")
    lacks = kernel_lacks(image)
    file = (PROJECT / "compose" / "docker-stack.yml").read_text()
    for need in lacks:
        assert NEEDS[need][0] in file
        file = file.replace(*NEEDS[need])
    (folder / "docker-stack.yml").write_text(file)
    (folder / "password").write_text(PASSWORD)
    docker("save", "--output", folder / "redis.tar", REDIS)
    registry.push(image, "vlrrbn", "first")
    for name, line in OTHERS.items():
        (folder / name).write_text(f"FROM {image}\n{line}\n")
        registry.push(build(name, "--file", folder / name, context=folder), "vlrrbn", name)
    beside = docker(
        "ps", "--quiet", "--filter", f"publish={registry.address.rpartition(':')[2]}"
    ).stdout.strip()
    node = ["docker:28-dind", "--privileged", "--network", NETWORK, "--env=REGISTRY=registry:5000"]
    engine = ["dockerd", "--insecure-registry", "registry:5000"]
    with contextlib.ExitStack() as stack:
        docker("network", "create", NETWORK)
        stack.callback(docker, "network", "rm", NETWORK)
        docker("network", "connect", "--alias", "registry", NETWORK, beside)
        stack.callback(docker, "network", "disconnect", NETWORK, beside)
        nodes = [
            stack.enter_context(container(*node, command=engine, wait=False)) for _ in range(3)
        ]
        for node in nodes:
            docker("cp", f"{folder}/.", f"{node.name}:/")
            docker("start", node.name)
        for node in nodes:
            eventually(
                lambda node=node: node.run("docker", "info", check=False).returncode == 0, 60
            )
        made = Swarm(nodes, lacks)
        made.docker("swarm", "init")
        token = made.docker("swarm", "join-token", "--quiet", "worker").strip()
        for node in nodes[1:]:
            node.run("docker", "swarm", "join", "--token", token, f"{made.manager.name}:2377")
        made.redis_node.run("docker", "load", "--input", "/redis.tar")
        made.set_node(made.redis_node, "--label-add", "lab25.redis=true")
        made.docker("secret", "create", "redis_password", "/password")
        made.docker(
            "login", "registry:5000", "--username", registry.user, "--password", registry.password
        )
        made.deploy("first")
        yield made


def test_every_node_answers_for_two_tasks_and_hits_travel_encrypted(swarm, image):
    if swarm.lacks:
        pytest.skip(
            f"the kernel lacks {' and '.join(swarm.lacks)}: a copy of the stack without those lines was tested"
        )
    sniff = "import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 8)\nwhile s.recv(99)[9] != 50: pass"
    options = ["--network", f"container:{swarm.redis_node.name}", "--user=0", "--cap-add=NET_RAW"]
    assert all(get_from_any([address]).status == 200 for address in swarm.addresses)
    with Travellers(swarm.addresses) as travellers:
        docker("run", "--rm", *options, image, "python", "-c", sniff, timeout=60)
    travellers.different_numbers()


@pytest.mark.parametrize(
    "facts", ["web python 10001 536870912 512", "redis redis-server 999 134217728 64"]
)
def test_the_program_is_process_1_without_privileges_within_limits(swarm, facts):
    service, program, uid, *limits = facts.split()
    node, task = swarm.tasks(service)[0]
    status = node.run("docker", "exec", task, "cat", "/proc/1/status").stdout
    assert re.search(r"Name:\t(.*)", status)[1] == program, (
        "a shell before it would hear SIGTERM instead"
    )
    assert set(re.search(r"Uid:(.*)", status)[1].split()) == {uid}
    assert set(re.findall(r"Cap\w+:\t(\w+)", status)) == {"0" * 16}
    assert (
        "Read-only" in node.run("docker", "exec", task, "touch", "/tmp/written", check=False).stderr
    )
    said = node.run(
        "docker", "inspect", "--format", "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}", task
    ).stdout
    assert said.split() == limits


def test_the_password_is_wanted_and_shown_nowhere(swarm):
    """Holds Redis up, so that its health check is there long enough to be looked at."""
    node, task = swarm.tasks("redis")[0]
    assert "NOAUTH" in node.run("docker", "exec", task, "redis-cli", "ping").stdout
    look = f"""
        redis=$(docker inspect --format '{{{{.State.Pid}}}}' {task})
        kill -STOP $redis
        until grep -qs '[r]edis-cli' /proc/[0-9]*/cmdline; do sleep 0.1; done
        cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ
        kill -CONT $redis"""
    told = node.run("sh", "-c", look, check=False).stdout
    for holder, name in swarm.tasks("web") + swarm.tasks("redis"):
        told += (
            holder.run("docker", "inspect", name).stdout + holder.run("docker", "logs", name).stdout
        )
    told += swarm.docker("service", "inspect", "lab25_web", "lab25_redis")
    assert "redis-cli\0--askpass" in told and "hush" not in told


def test_an_update_under_load_loses_no_request(swarm):
    with Travellers(swarm.addresses) as travellers:
        swarm.deploy("second")
    travellers.different_numbers()
    assert {get_from_any(swarm.addresses, "/health").json["version"] for _ in range(9)} == {
        "second"
    }


@pytest.mark.parametrize("broken", ["bad-port", "never-healthy"])
def test_a_broken_image_is_rolled_back_and_the_old_one_answers_all_along(swarm, broken):
    with Travellers(swarm.addresses) as travellers:
        assert "update rolled back" in swarm.deploy(broken)
    travellers.different_numbers()
    assert f"lab25-web:{broken}" not in swarm.docker("service", "ls")
    eventually(swarm.settled, 30)


def test_a_drained_node_loses_no_request(swarm):
    with Travellers(swarm.addresses) as travellers:
        for node in (
            swarm.worker,
            swarm.manager,
        ):  # the second has a task when the first has none any more
            swarm.set_node(node, "--availability", "drain")
            eventually(
                lambda node=node: len(tasks := dict(swarm.tasks("web"))) == 2 and node not in tasks,
                60,
            )
            swarm.set_node(node, "--availability", "active")
    # A worker that ends may close a connection that it has not read; the mesh would have sent that one elsewhere.
    travellers.different_numbers(lost=1 if "IPVS" in swarm.lacks else 0)


def test_a_killed_node_costs_only_the_requests_on_it(swarm):
    assert swarm.worker in dict(swarm.tasks("web")), "the test before left one there"
    with Travellers(swarm.addresses) as travellers:
        docker("kill", swarm.worker.name)
        try:
            eventually(swarm.settled, 90)
        finally:
            docker("start", swarm.worker.name)
    travellers.different_numbers(lost=8)  # the processes of a killed node end one after the other
    eventually(lambda: "Down" not in swarm.docker("node", "ls"), 60)


def test_the_count_goes_on_with_every_answered_hit_when_redis_node_was_killed(swarm):
    with Travellers(swarm.addresses) as travellers:
        time.sleep(2)
        docker("kill", swarm.redis_node.name)
        time.sleep(
            5
        )  # as a machine that boots; the others take half a minute to notice one that is back within one
        docker("start", swarm.redis_node.name)
        swarm.next_hit()
    assert swarm.next_hit() > max(travellers.different_numbers(lost=8))
    eventually(swarm.settled, 60)
