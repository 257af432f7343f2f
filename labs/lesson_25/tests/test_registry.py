"""The registry file, on a machine that has only Docker and this one file; the registry is the tests' own."""

import json
import os
import pathlib
import shutil

import pytest
from clients import eventually
from engine import LESSON, RUN, Stack, build, container, docker, remove_images

pytestmark = pytest.mark.engine

REGISTRY_FILE = LESSON / "compose" / "docker-compose.registry.yml"
OWNER = "some-owner"
USER, PASSWORD = "lesson", "lesson"
# `htpasswd -Bbn lesson lesson`: the registry knows no other kind of account
HTPASSWD = "lesson:$2y$05$uK5JhwjKe628.8cBIQK3rusVpLo28wDMvun.dZeWRBPIfpKZA1zJC\n"


class Registry:
    """A registry of the tests' own, which wants a login for everything, as a private package does."""

    def __init__(self, port, config):
        self.address = f"127.0.0.1:{port}"
        self.logged_in = {**os.environ, "DOCKER_CONFIG": str(config)}

    def name(self, tag):
        return f"{self.address}/{OWNER}/lab25-web:{tag}"

    def push(self, image, *tags):
        """Push `image` under each tag and leave no image of these names on the machine. Return the digest."""
        for tag in tags:
            docker("tag", image, self.name(tag))
            docker("push", self.name(tag), env=self.logged_in)
            digest = docker(
                "buildx", "imagetools", "inspect", "--format", "{{json .Manifest}}", self.name(tag), env=self.logged_in
            )
            docker("image", "rm", self.name(tag))
        return json.loads(digest.stdout)["digest"]


def docker_config(folder, **auths):
    """Make a Docker configuration like this user's, but with no login of theirs, and return its folder."""
    own = pathlib.Path(os.environ.get("DOCKER_CONFIG") or pathlib.Path.home() / ".docker")
    folder.mkdir()
    settings = {}
    if own.is_dir():
        for entry in own.iterdir():
            if entry.name != "config.json":
                (folder / entry.name).symlink_to(entry)
        if (own / "config.json").exists():
            settings = json.loads((own / "config.json").read_text())
    for login in ("auths", "credsStore", "credHelpers"):
        settings.pop(login, None)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    accounts = folder / "htpasswd"
    accounts.write_text(HTPASSWD)
    options = ["--publish", "127.0.0.1::5000", "--env", "REGISTRY_AUTH=htpasswd"]
    options += ["--env", "REGISTRY_AUTH_HTPASSWD_REALM=lesson", "--env", "REGISTRY_AUTH_HTPASSWD_PATH=/htpasswd"]
    with container("registry:2", *options, wait=False) as made:
        docker("cp", accounts, f"{made.name}:/htpasswd")
        docker("start", made.name)
        running = Registry(made.port(5000), docker_config(folder / "docker"))
        login = ["login", running.address, "--username", USER, "--password", PASSWORD]
        eventually(lambda: docker(*login, env=running.logged_in, check=False).returncode == 0, 15)
        yield running


@pytest.fixture
def deploy(registry, tmp_path):
    """A function that returns the registry file's Stack for a tag, in a folder that holds this one file."""
    machine = tmp_path / "machine"
    machine.mkdir()
    shutil.copy(REGISTRY_FILE, machine)
    project = f"{RUN}-machine"
    made = []

    def stack(tag=None, owner=OWNER, config=registry.logged_in["DOCKER_CONFIG"]):
        environment = {"REGISTRY": registry.address, "GHCR_OWNER": owner, "DOCKER_CONFIG": str(config)}
        if tag:
            environment["IMAGE_TAG"] = tag
        made.append(Stack(tmp_path, machine / REGISTRY_FILE.name, environment=environment, project=project))
        made[-1].port = made[0].port
        made[-1].environment["LAB25_PORT"] = str(made[0].port)
        return made[-1]

    yield stack
    made[0].down("--volumes")
    remove_images(registry.address)


def test_deploys_each_published_tag_and_dev_by_default(registry, deploy, image):
    tags = ["main", "sha-0a1b2c3", "latest", "dev"]
    registry.push(image, *tags)
    for hit, tag in enumerate([None, *tags], start=1):
        stack = deploy(tag)
        stack.up()
        assert stack.get("/health").json["version"] == "0a1b2c3"
        assert stack.hits() == hit
        assert stack.container("web").inspect()["Config"]["Image"] == registry.name(tag or "dev")
        remove_images(registry.address)


def test_takes_a_newer_image_of_the_same_tag_and_goes_back_by_digest(registry, deploy, image):
    old = registry.push(image, "moving")
    stack = deploy("moving")
    stack.up()
    assert stack.hits() == 1
    registry.push(build("newer", "--build-arg", "BUILD_VERSION=newer"), "moving")
    stack.up()
    assert stack.get("/health").json["version"] == "newer"
    assert stack.hits() == 2
    stack = deploy(f"moving@{old}")
    stack.up()
    assert stack.get("/health").json["version"] == "0a1b2c3"
    assert stack.hits() == 3


def test_says_what_is_wrong_and_leaves_what_runs(registry, deploy, image, tmp_path):
    registry.push(image, "dev")
    running = deploy()
    running.up()
    before = running.container("web").inspect()["Id"]
    nobody = docker_config(tmp_path / "nobody")
    mistakes = {
        "wrong-tag": deploy(tag="wrong-tag"),
        "nobody-else": deploy(owner="nobody-else"),
        "no basic auth credentials": deploy(config=nobody),
    }
    for words, stack in mistakes.items():
        result = stack.up(check=False)
        assert result.returncode != 0
        assert words in result.stderr
        assert running.container("web").inspect()["Id"] == before
        assert running.get().status == 200
    assert running.container("redis").health == "healthy"


def test_changing_from_the_local_file_keeps_the_counter(registry, deploy, image, tmp_path):
    registry.push(image, "dev")
    published = deploy()
    local = Stack(
        tmp_path,
        LESSON / "compose" / "docker-compose.yml",
        web=f"    image: {RUN}:local\n",
        project=published.project,
    )
    local.up("--build")
    assert [local.hits() for _ in range(2)] == [1, 2]
    published.up()
    assert published.hits() == 3
    assert published.container("web").inspect()["Config"]["Image"] == registry.name("dev")
    local.up("--build")
    assert local.hits() == 4
