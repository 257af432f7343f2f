"""The docker command line, and the containers, images and stacks of one test run.

Everything is named after RUN: it meets nobody else's containers, counter or images, and what
is left of it can be found.
"""

import contextlib
import functools
import json
import os
import random
import secrets
import socket
import subprocess
import time

from harness import PROJECT
from harness.clients import counted, eventually, get
from harness.limits import PATIENCE_SECONDS

CONTEXT = PROJECT / "app"
LOCAL_FILE = PROJECT / "compose" / "docker-compose.yml"
BASE, REDIS = "python:3.12-slim", "redis:7-alpine"
RUN = f"lab25-test-{secrets.token_hex(4)}"


def docker(*arguments, check=True, timeout=300, **options):
    """Run the docker command and return its CompletedProcess; with `check`, fail where it does."""
    command = ["docker", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **options}
    result = subprocess.run(command, timeout=timeout, **options)
    assert not check or result.returncode == 0, (
        f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    )
    return result


@functools.cache
def problem():
    """Return why there is no engine to work with, or None."""
    # Without the version of the server, it would not ask the server.
    columns = "{{.ServerVersion}} {{range .ClientInfo.Plugins}}{{.Name}} {{end}}"
    try:
        result = docker("info", "--format", columns, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`docker info` failed: {error}"
    if result.returncode:
        return f"`docker info` failed: {result.stderr.strip().splitlines()[-1]}"
    missing = {"compose", "buildx"} - set(result.stdout.split())
    return f"docker has no {' and no '.join(sorted(missing))}" if missing else None


def inspect(name, what="container"):
    """Return what `docker inspect` tells of a container or an image."""
    return json.loads(docker(what, "inspect", name).stdout)[0]


_ports = set()


def free_port():
    """Return a TCP port of this machine where nothing listens, and another one each time.

    It is below those that the kernel and the engine give out by themselves, so that none of them
    takes it before it is used.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        if port in _ports:
            continue
        _ports.add(port)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


has_built = False


def build(tag, *options, context=CONTEXT):
    """Build `context` as RUN:tag and return that name; it is removed when the run ends."""
    global has_built
    has_built = True
    image = f"{RUN}:{tag}"
    docker("build", "--tag", image, *options, context)
    return image


def layer_sizes(image):
    """Return the unpacked bytes of each line of the image's history, the last made first."""
    listing = docker("history", "--human=false", "--format", "{{.Size}}", image).stdout
    return [int(size) for size in listing.split()]


@functools.cache
def base_lines():
    """Return how many lines of a history are the base image's.

    It is pulled where it is missing: not every engine keeps the base image of a build.
    """
    if docker("image", "inspect", BASE, check=False).returncode != 0:
        docker("pull", "--quiet", BASE)
    return len(layer_sizes(BASE))


def bytes_over_base(image):
    return sum(layer_sizes(image)[: -base_lines()])


def remove_images(naming=RUN):
    """Remove every image whose name contains `naming`, by default those that this run has made."""
    columns = "{{.Repository}} {{.Tag}} {{.Digest}}"
    listing = ["image", "ls", "--all", "--digests", "--format", columns]
    said = eventually(lambda: succeeds(*listing), every=1, broken="the images cannot be listed")
    for repository, tag, digest in map(str.split, said.stdout.splitlines()):
        if naming in repository:
            name = f"{repository}@{digest}" if tag == "<none>" else f"{repository}:{tag}"
            remove_image(name)


def remove_image(name):
    """Remove an image by its name.

    A run at the same time may have made the very same image. While only a container of that run
    uses it, the engine does not give it up.
    """
    removal = ["image", "rm", name]
    gone = "No such image"
    eventually(lambda: succeeds(*removal, or_says=gone), every=1, broken=f"{name} is not removed")


def succeeds(*arguments, or_says=None):
    """Return the CompletedProcess of a docker command that another run may hold up for a while.

    Raises OSError with what it says, unless it ends well or says that it need not be done.
    """
    result = docker(*arguments, check=False)
    if result.returncode and not (or_says and or_says in result.stderr):
        raise OSError(result.stderr.strip())
    return result


def remove_all(naming):
    """Remove every container, network, volume and image whose name contains `naming`."""
    named = ["--quiet", "--filter", f"name={naming}"]
    for listing, removal in (
        (["ps", "--all"], ["rm", "--force", "--volumes"]),
        (["network", "ls"], ["network", "rm"]),
        (["volume", "ls"], ["volume", "rm", "--force"]),
    ):
        if found := docker(*listing, *named).stdout.split():
            docker(*removal, *found)
    remove_images(naming)


def give_image(image, node, folder):
    """Load an image of this engine into the one that runs in the container `node`."""
    archive = folder / "image.tar"
    docker("save", "--output", archive, image)
    docker("cp", archive, f"{node.name}:/image.tar")
    node.run("docker", "load", "--input", "/image.tar")


class Container:
    """A container, by its name or ID; `port` is the one of this machine where it is published."""

    def __init__(self, name, port=None):
        self.name = name
        self.port = port

    def inspect(self):
        return inspect(self.name)

    @property
    def health(self):
        return self.inspect()["State"]["Health"]["Status"]

    def get(self, path="/", timeout=5):
        return get(self.port, path, timeout=timeout)

    def address(self, network="bridge"):
        """Return its IP address in a network; this machine reaches it if the engine runs here."""
        return self.inspect()["NetworkSettings"]["Networks"][network]["IPAddress"]

    def memory_bytes(self):
        """Return what `docker stats` says that it uses."""
        said = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", self.name).stdout
        used = said.split(" /")[0]
        number, unit = used[:-3], used[-3:]
        return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]

    @contextlib.contextmanager
    def frozen(self):
        """Let none of its processes run, in a `with` block."""
        docker("pause", self.name)
        try:
            yield
        finally:
            docker("unpause", self.name)

    def log(self):
        result = docker("logs", self.name)
        return result.stdout + result.stderr

    def wait_for(self, condition, seconds=PATIENCE_SECONDS, **broken):
        """Return what `eventually` does; fail with the log, and soon if the container ended."""
        next_look = time.monotonic() + 1

        def true_while_it_runs():
            nonlocal next_look
            if time.monotonic() > next_look:  # not each time: the engine has more to do
                state = self.inspect()["State"]
                assert state["Status"] != "exited", f"it ended with status {state['ExitCode']}"
                next_look = time.monotonic() + 1
            return condition()

        try:
            return eventually(true_while_it_runs, seconds, **broken)
        except AssertionError as failure:
            raise AssertionError(f"{failure}; its log:\n{self.log()}") from None

    def run(self, *command, **options):
        """Run a command inside and return its CompletedProcess."""
        return docker("exec", self.name, *command, **options)

    def python(self, program):
        """Run a Python program inside and return what it prints."""
        return self.run("python", "-c", program).stdout


@contextlib.contextmanager
def container(image, *options, command=(), port_inside=8080, wait=True):
    """Yield a Container of `image`, its port published; with `wait`, it serves already.

    The engine does not look after its health: each look is a process that starts Python.
    """
    made = Container(f"{RUN}-{secrets.token_hex(3)}", free_port())
    options = ["--publish", f"127.0.0.1:{made.port}:{port_inside}", "--no-healthcheck", *options]
    name = made.name
    try:
        docker("create", "--name", name, *options, image, *command)
        if wait:
            docker("start", name)
            made.wait_for(lambda: made.get("/health"), broken=f"{image} does not answer /health")
        yield made
    finally:
        docker("rm", "--force", "--volumes", name)


def ping(redis):
    """Return whether Redis answers from within its container."""
    return "PONG" in redis.run("redis-cli", "ping", check=False).stdout


@contextlib.contextmanager
def redis_in(network, *options):
    """Yield the Container of a Redis that answers in this network."""
    with container(REDIS, "--network", network, *options, wait=False) as made:
        docker("start", made.name)
        made.wait_for(lambda: ping(made), broken="a Redis of the tests does not answer a PING")
        yield made


UP_PATIENCE_SECONDS = 60


class Stack:
    """A Compose file under a project name, port and image name of the tests' own.

    Container names are fixed in the files, so an override takes them away.
    """

    def __init__(self, folder, *files, web="", environment=None, project=None, port=None):
        self.project = project or f"{RUN}-{secrets.token_hex(3)}"
        self.port = port or free_port()
        self.network = f"{self.project}_backend"
        # What web finds here it does not ask the engine for.
        self.hosts = folder / f"{secrets.token_hex(3)}.hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        override = folder / f"{secrets.token_hex(3)}.yml"
        override.write_text(
            "services:\n"
            "  web:\n"
            "    container_name: !reset null\n"
            f"    volumes: ['{self.hosts}:/etc/hosts:ro']\n"
            f"{web}"
            "  redis:\n"
            "    container_name: !reset null\n"
        )
        self.files = [*files, override]
        self.environment = {**os.environ, "LAB25_PORT": str(self.port), **(environment or {})}

    def command(self, *arguments):
        """Return the docker compose command for this stack; it wants `environment`."""
        files = [word for file in self.files for word in ("--file", file)]
        return ["docker", "compose", "--project-name", self.project, *files, *arguments]

    def compose(self, *arguments, **options):
        return docker(*self.command(*arguments)[1:], env=self.environment, **options)

    def up(self, *options):
        """Start the stack and wait until it is healthy; fail with its log where it is not.

        A container that a busy machine starts slowly is unhealthy first, and is waited for.
        """
        deadline = time.monotonic() + UP_PATIENCE_SECONDS
        while True:
            started = self.compose("up", "--detach", "--wait", *options, check=False)
            if started.returncode == 0:
                return
            if "is unhealthy" not in started.stderr or time.monotonic() > deadline:
                break
            time.sleep(1)
        log = self.compose("logs", check=False).stdout
        raise AssertionError(f"the stack is not healthy: {started.stderr}\nits log:\n{log}")

    def down(self, *options):
        return self.compose("down", "--remove-orphans", "--timeout", "2", *options)

    def container(self, service):
        return Container(self.compose("ps", "--all", "--quiet", service).stdout.strip())

    def get(self, path="/", timeout=5):
        return get(self.port, path, timeout=timeout)

    @contextlib.contextmanager
    def redis_moved(self):
        """Lead the name of Redis to a second one, in a `with` block.

        The first becomes its replica: it lives on, keeps its connections, and refuses to count.
        """
        first = self.container("redis")
        with redis_in(self.network) as second:
            address = second.address(self.network)
            first.run("redis-cli", "replicaof", address, "6379")
            self.hosts.write_text(f"127.0.0.1 localhost\n{address} redis\n")
            try:
                yield second
            finally:
                self.hosts.write_text("127.0.0.1 localhost\n")
                first.run("redis-cli", "replicaof", "no", "one")

    def hits(self):
        """Return the number of the next hit, once there is one."""
        return eventually(lambda: counted(self.get()), broken="the stack counts no hit")


@contextlib.contextmanager
def local_stack(folder, image, file=LOCAL_FILE):
    """Yield the local Compose file's Stack, built as `image`; everything of it goes at the end."""
    made = Stack(folder, file, web=f"    image: {image}\n")
    try:
        yield made
    finally:
        made.down("--volumes")


def kill(container_name):
    """Send SIGKILL to a container's first process, as a crash would.

    `docker kill` would not do: the engine takes it for the operator's wish, and does not restart
    the container.
    """
    pid = inspect(container_name)["State"]["Pid"]
    docker("run", "--rm", "--pid", "host", "--privileged", REDIS, "sh", "-c", f"kill -9 {pid}")
