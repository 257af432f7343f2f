"""The registry file, on a machine that has only Docker and this one file.

The registry is the tests' own.
"""

import shutil

import pytest

from harness import PROJECT
from harness.engine import LOCAL_FILE, RUN, Stack, build, docker, free_port, remove_images

pytestmark = pytest.mark.engine

REGISTRY_FILE = PROJECT / "compose" / "docker-compose.registry.yml"
OWNER = "some-owner"


@pytest.fixture
def deploy(registry, tmp_path):
    """A function that returns the registry file's Stack for a tag; its folder has no other file."""
    machine = tmp_path / "machine"
    machine.mkdir()
    shutil.copy(REGISTRY_FILE, machine)
    fixed = {"project": f"{RUN}-machine", "port": free_port()}

    def stack(tag="", owner=OWNER, environment=registry.logged_in):
        environment = {
            **environment,
            "REGISTRY": registry.address,
            "GHCR_OWNER": owner,
            "IMAGE_TAG": tag,
        }
        return Stack(tmp_path, machine / REGISTRY_FILE.name, environment=environment, **fixed)

    yield stack
    stack().down("--volumes")
    remove_images(f"{registry.address}/{OWNER}")  # not those of a reader of the texts


def runs(stack, version, image, hit):
    """Fail unless the stack runs this version, by this name of the image, and goes on counting."""
    shown = stack.get("/health").json["version"]
    assert shown == version, f"{image} runs as version {shown}, not {version}"
    named = stack.container("web").inspect()["Config"]["Image"]
    assert named == image, f"the stack runs {named}, not {image}"
    assert (number := stack.hits()) == hit, f"hit {hit} has the number {number}"


def test_deploys_each_published_tag_and_dev_by_default(registry, deploy, image):
    tags = ["main", "sha-0a1b2c3", "latest"]
    registry.push(image, OWNER, "dev", *tags)
    for tag in tags:
        stack = deploy(tag)
        stack.compose("pull", "--quiet", "web")
        named = stack.compose("config", "--images").stdout.split()
        assert registry.name(OWNER, tag) in named, f"with IMAGE_TAG={tag} the images are {named}"
        remove_images(f"{registry.address}/{OWNER}")
    stack = deploy()
    stack.up()
    runs(stack, "0a1b2c3", registry.name(OWNER, "dev"), hit=1)


def test_takes_a_newer_image_of_the_same_tag_and_goes_back_by_digest(registry, deploy, image):
    old = registry.push(image, OWNER, "moving")
    registry.push(build("newer", "--build-arg", "BUILD_VERSION=newer"), OWNER, "moving")
    docker("tag", image, registry.name(OWNER, "moving"))  # which the machine still has
    stack = deploy("moving")
    stack.up()
    runs(stack, "newer", registry.name(OWNER, "moving"), hit=1)
    stack = deploy(f"moving@{old}")
    stack.up()
    runs(stack, "0a1b2c3", registry.name(OWNER, f"moving@{old}"), hit=2)


def test_changing_from_the_local_file_keeps_the_counter(registry, deploy, image, tmp_path):
    registry.push(image, OWNER, "dev")
    published = deploy()
    local = Stack(tmp_path, LOCAL_FILE, web=f"    image: {image}\n", project=published.project)
    local.up()
    runs(local, "0a1b2c3", image, hit=1)
    published.up()
    runs(published, "0a1b2c3", registry.name(OWNER, "dev"), hit=2)
    local.up()
    runs(local, "0a1b2c3", image, hit=3)
