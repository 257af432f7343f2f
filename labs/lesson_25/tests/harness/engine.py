"""The docker command line, and the containers, images and stacks of one test run.

All of their names contain RUN, so that runs in parallel do not conflict.
"""

import contextlib
import functools
import json
import os
import random
import secrets
import socket
import subprocess

from harness import PROJECT
from harness.clients import counted, eventually, get
from harness.limits import PATIENCE_SECONDS

CONTEXT = PROJECT / "app"
LOCAL_FILE = PROJECT / "compose" / "docker-compose.yml"
BASE, REDIS = "python:3.12-slim", "redis:7-alpine"
RUN = f"lab25-test-{secrets.token_hex(4)}"


def docker(*arguments, check=True, timeout=300, **options):
    """Run docker and return its CompletedProcess. With `check`, fail if the command fails."""
    command = ["docker", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, **options}
    result = subprocess.run(command, timeout=timeout, **options)
    assert not check or result.returncode == 0, (
        f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    )
    return result


@functools.cache
def problem():
    """Return why no engine can be used, or None."""
    # Without the server's version, docker would not connect to the server.
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
    """Return the data that `docker inspect` prints for a container or an image."""
    return json.loads(docker(what, "inspect", name).stdout)[0]


def free_port():
    """Return a TCP port of this machine on which nothing listens.

    It is below the ports that the kernel and the engine choose themselves, so none of them takes it
    before it is used.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


# Images

has_built = False


def build(tag, *options, context=CONTEXT):
    """Build `context` as RUN:tag and return this name. The image is removed when the run ends."""
    global has_built
    has_built = True
    image = f"{RUN}:{tag}"
    docker("build", "--tag", image, *options, context)
    return image


def layer_sizes(image):
    """Return the unpacked bytes of each line of the image's history, the newest first."""
    listing = docker("history", "--human=false", "--format", "{{.Size}}", image).stdout
    return [int(size) for size in listing.split()]


@functools.cache
def base_lines():
    """Return how many lines of a history belong to the base image."""
    # Not every engine keeps the base image of a build.
    if docker("image", "inspect", BASE, check=False).returncode != 0:
        docker("pull", "--quiet", BASE)
    return len(layer_sizes(BASE))


def give_image(image, node, folder):
    """Load an image of this engine into the engine in the container `node`."""
    archive = folder / "image.tar"
    docker("save", "--output", archive, image)
    docker("cp", archive, f"{node.name}:/image.tar")
    node.run("docker", "load", "--input", "/image.tar")


def remove_images(naming=RUN):
    """Remove every image of which a part of the name starts with `naming`."""
    patterns = (f"{naming}*", f"*/{naming}*/*", f"*/*/{naming}*")
    # A listing without patterns fails if another run removes an image at the same time.
    filters = [f"--filter=reference={pattern}" for pattern in patterns]
    name = '{{.Repository}}{{if eq .Tag "<none>"}}@{{.Digest}}{{else}}:{{.Tag}}{{end}}'
    if names := docker("image", "ls", "--digests", "--format", name, *filters).stdout.split():
        docker("image", "rm", "--force", *names)


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


# Containers


class Container:
    """A container, by its name or ID. `port` is its published port on this machine."""

    def __init__(self, name, port=None):
        self.name = name
        self.port = port

    def inspect(self):
        return inspect(self.name)

    def get(self, path="/"):
        return get(self.port, path)

    def address(self, network="bridge"):
        """Return its IP address in a network, which this machine reaches if the engine is local."""
        return self.inspect()["NetworkSettings"]["Networks"][network]["IPAddress"]

    def memory_bytes(self):
        """Return the memory that `docker stats` shows."""
        usage = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", self.name).stdout
        used = usage.split(" /")[0]
        number, unit = used[:-3], used[-3:]
        return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]

    def log(self):
        result = docker("logs", self.name)
        return result.stdout + result.stderr

    def wait_for(self, condition, seconds=PATIENCE_SECONDS, **broken):
        """Return the result of `eventually`. Fail with the log, at once if the container exits."""

        def true_while_it_runs():
            state = self.inspect()["State"]
            assert state["Status"] != "exited", f"it exited with status {state['ExitCode']}"
            return condition()

        try:
            return eventually(true_while_it_runs, seconds, **broken)
        except AssertionError as failure:
            raise AssertionError(f"{failure}; its log:\n{self.log()}") from None

    def run(self, *command, **options):
        """Run a command in it and return its CompletedProcess."""
        return docker("exec", self.name, *command, **options)

    def python(self, program):
        """Run a Python program in it and return what it prints."""
        return self.run("python", "-c", program).stdout


@contextlib.contextmanager
def container(image, *options, command=(), port_inside=8080, wait=True):
    """Yield a Container of `image` with a published port. With `wait`, it answers already.

    It has no health check, since each one would start another Python.
    """
    made = Container(f"{RUN}-{secrets.token_hex(3)}", free_port())
    options = ["--publish", f"127.0.0.1:{made.port}:{port_inside}", "--no-healthcheck", *options]
    try:
        docker("run", "--detach", "--name", made.name, *options, image, *command)
        if wait:
            made.wait_for(lambda: made.get("/health"), broken=f"{image} does not answer /health")
        yield made
    finally:
        docker("rm", "--force", "--volumes", made.name)


@contextlib.contextmanager
def redis_in(network, *options):
    """Yield the Container of a Redis in this network, which answers already."""
    with container(REDIS, "--network", network, *options, wait=False) as made:
        made.wait_for(
            lambda: "PONG" in made.run("redis-cli", "ping", check=False).stdout,
            broken="a Redis of the tests does not answer a PING",
        )
        yield made


# Stacks


class Stack:
    """Compose files under a project name and a port of this run.

    An override removes the fixed container names. `web` has more lines for that service.
    """

    def __init__(self, folder, *files, web=""):
        self.project = f"{RUN}-{secrets.token_hex(3)}"
        self.port = free_port()
        override = folder / f"{self.project}.yml"
        override.write_text(
            "services:\n"
            "  web:\n"
            "    container_name: !reset null\n"
            f"{web}"
            "  redis:\n"
            "    container_name: !reset null\n"
        )
        self.files = [*files, override]
        self.environment = {**os.environ, "LAB25_PORT": str(self.port)}

    def compose(self, *arguments, **options):
        files = [word for file in self.files for word in ("--file", file)]
        command = ["compose", "--project-name", self.project, *files, *arguments]
        return docker(*command, env=self.environment, **options)

    def up(self, *options):
        """Start the stack and wait until it is healthy. Fail with its log if it is not."""
        started = self.compose("up", "--detach", "--wait", *options, check=False)
        if started.returncode:
            log = self.compose("logs", check=False).stdout
            raise AssertionError(f"the stack is not healthy: {started.stderr}\nits log:\n{log}")

    def down(self, *options):
        return self.compose("down", "--remove-orphans", "-t", "2", *options)

    def container(self, service):
        return Container(self.compose("ps", "--all", "--quiet", service).stdout.strip())

    def get(self, path="/"):
        return get(self.port, path)

    def hits(self):
        """Return the number of the next hit that is counted."""
        return eventually(lambda: counted(self.get()), broken="the stack counts no hit")


@contextlib.contextmanager
def local_stack(folder, image, web=""):
    """Yield the Stack of the local Compose file with `image`, and remove it at the end."""
    made = Stack(folder, LOCAL_FILE, web=f"    image: {image}\n{web}")
    try:
        yield made
    finally:
        made.down("--volumes")
