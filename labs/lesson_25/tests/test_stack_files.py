"""What the Compose files and the stack file say, read as data: each promise with its place."""

import itertools
import re
import shlex

import pytest
import yaml

from harness import PROJECT

LOCAL, REGISTRY, STACK = (f"docker-{name}.yml" for name in ("compose", "compose.registry", "stack"))
COMPOSE = [LOCAL, REGISTRY]
APPEND_ONLY = "redis-server --save '' --appendonly yes --appendfsync always"

# What is promised, and where a file says it; None: nothing may stand there.
OF_EACH_SERVICE = {
    "it is in the network of the stack": ("networks", ["backend"]),
    "it cannot write to its own files": ("read_only", True),
    "it has no capability": ("cap_drop", ["ALL"]),
    "it is given no capability": ("cap_add", None),
    "it does not run as root with all rights": ("privileged", None),
    "its log does not fill the disk": ("logging", {"driver": "local"}),
}
OF_REDIS = {
    "Redis is of version 7": ("services.redis.image", "redis:7-alpine"),
    "Redis does not run as root": ("services.redis.user", "redis"),
    "nobody outside reaches Redis": ("services.redis.ports", None),
    "Redis' health is asked every 10 seconds": ("services.redis.healthcheck.interval", "10s"),
    "a health check of Redis ends after 3 seconds": ("services.redis.healthcheck.timeout", "3s"),
    "Redis has 10 seconds to start": ("services.redis.healthcheck.start_period", "10s"),
    "Redis is known to be healthy as soon as it is": (
        "services.redis.healthcheck.start_interval",
        "0.25s",
    ),
}
OF_COMPOSE = {
    "the project is lab25": ("name", "lab25"),
    "web's container is lab25-web": ("services.web.container_name", "lab25-web"),
    "Redis' container is lab25-redis": ("services.redis.container_name", "lab25-redis"),
    "web waits for a healthy Redis": (
        "services.web.depends_on",
        {"redis": {"condition": "service_healthy"}},
    ),
    "web counts in this Redis": ("services.web.environment", {"REDIS_HOST": "redis"}),
    "only this machine reaches web, at the port that LAB25_PORT names": (
        "services.web.ports",
        ["127.0.0.1:${LAB25_PORT:-8080}:8080"],
    ),
    "web's health check is the image's": ("services.web.healthcheck", None),
    "web has the memory that 16 workers need": ("services.web.mem_limit", "512m"),
    "web has the processes that 16 workers need": ("services.web.pids_limit", 512),
    "Redis may not take all memory": ("services.redis.mem_limit", "128m"),
    "Redis may not take all processes": ("services.redis.pids_limit", 64),
    "an answered hit is on the disk": ("services.redis.command", shlex.split(APPEND_ONLY)),
    "Redis is healthy when it answers without an error": (
        "services.redis.healthcheck.test",
        ["CMD", "redis-cli", "-e", "ping"],
    ),
    "the count is in the volume": ("services.redis.volumes", ["redis_data:/data"]),
    "the volume is the project's own": ("volumes", {"redis_data": None}),
    "the network is the project's own": ("networks", {"backend": None}),
    **{
        f"{service} {promise}": (f"services.{service}.{key}", value)
        for service in ("web", "redis")
        for promise, key, value in (
            ("comes back after a crash", "restart", "unless-stopped"),
            ("gains no privileges", "security_opt", ["no-new-privileges:true"]),
        )
    },
}
OF_THE_STACK = {
    "the published image runs": (
        "services.web.image",
        "${REGISTRY:-ghcr.io}/${GHCR_OWNER}/lab25-web:${IMAGE_TAG:-dev}",
    ),
    "web counts in this Redis, with the password from a file": (
        "services.web.environment",
        {"REDIS_HOST": "redis", "REDIS_PASSWORD_FILE": "/run/secrets/redis_password"},
    ),
    "web has the secret": ("services.web.secrets", ["redis_password"]),
    "every machine answers at the port that LAB25_PORT names": (
        "services.web.ports",
        ["${LAB25_PORT:-8080}:8080"],
    ),
    "web's health is asked as the image says, but every 3 seconds": (
        "services.web.healthcheck",
        {"interval": "3s"},
    ),
    "one task answers while the other is away": ("services.web.deploy.replicas", 2),
    "the old task answers until the new one is healthy": (
        "services.web.deploy.update_config.order",
        "start-first",
    ),
    "tasks are replaced one by one": ("services.web.deploy.update_config.parallelism", None),
    "a task that ended is back before the next is replaced": (
        "services.web.deploy.update_config.delay",
        "10s",
    ),
    "a version that turns bad after its start is found out": (
        "services.web.deploy.update_config.monitor",
        "30s",
    ),
    "a bad version is rolled back": (
        "services.web.deploy.update_config.failure_action",
        "rollback",
    ),
    "the bad task answers until the old version is healthy": (
        "services.web.deploy.rollback_config.order",
        "start-first",
    ),
    "web has the memory that 16 workers need": (
        "services.web.deploy.resources.limits.memory",
        "512m",
    ),
    "web has the processes that 16 workers need": (
        "services.web.deploy.resources.limits.pids",
        512,
    ),
    "Redis may not take all memory": ("services.redis.deploy.resources.limits.memory", "128m"),
    "Redis may not take all processes": ("services.redis.deploy.resources.limits.pids", 64),
    "Redis has no password in its environment": ("services.redis.environment", None),
    "Redis has the secret": ("services.redis.secrets", ["redis_password"]),
    "the secret is in no file": ("secrets.redis_password", {"external": True}),
    "Redis is healthy when it answers to the password": (
        "services.redis.healthcheck.test",
        r"tr -d '\r\n' </run/secrets/redis_password | redis-cli --askpass -e ping",
    ),
    "a connection to Redis that is idle for 15 minutes stays": (
        "services.redis.deploy.endpoint_mode",
        "dnsrr",
    ),
    "Redis stays on the machine with its data": (
        "services.redis.deploy.placement.constraints",
        ["node.labels.lab25.redis == true"],
    ),
    "there is one Redis": ("services.redis.deploy.replicas", None),
    "the count is in the volume": ("services.redis.volumes", ["swarm_redis_data:/data"]),
    "the volume is not the one of Compose": ("volumes", {"swarm_redis_data": None}),
    "what goes from machine to machine is encrypted": (
        "networks",
        {"backend": {"driver_opts": {"encrypted": "true"}}},
    ),
}


def read(file):
    return yaml.safe_load((PROJECT / "compose" / file).read_text())


def said(file, place):
    """Return what a file says at a place, None where it says nothing."""
    data = read(file)
    for key in place.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


def each_service(promises):
    return {
        f"{service}: {promise}": (f"services.{service}.{key}", value)
        for service in ("web", "redis")
        for promise, (key, value) in promises.items()
    }


def rows():
    """Return a parameter (file, promise, place, value) for each promise of each file."""
    own = {LOCAL: OF_COMPOSE, REGISTRY: OF_COMPOSE, STACK: OF_THE_STACK}
    return [
        pytest.param(file, promise, *row, id=f"{file}-{promise}")
        for file, promises in own.items()
        for promise, row in {**each_service(OF_EACH_SERVICE), **OF_REDIS, **promises}.items()
    ]


@pytest.mark.parametrize(("file", "promise", "place", "value"), rows())
def test_each_file_keeps_its_promises(file, promise, place, value):
    seen = said(file, place)
    assert seen == value, f"broken in {file}: {promise}. {place} is {seen!r} instead of {value!r}"


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        (LOCAL, "services.web.build", "../app"),
        (LOCAL, "services.web.image", "lab25-web:dev"),
        (LOCAL, "services.web.develop", {"watch": [{"action": "rebuild", "path": "../app"}]}),
        (
            REGISTRY,
            "services.web.image",
            "${REGISTRY:-ghcr.io}/${GHCR_OWNER:-vlrrbn}/lab25-web:${IMAGE_TAG:-dev}",
        ),
        (REGISTRY, "services.web.pull_policy", "always"),
    ],
)
def test_the_image_is_built_here_or_pulled_anew(file, place, value):
    seen = said(file, place)
    assert seen == value, f"{file} has another image: {place} is {seen!r} instead of {value!r}"


def leaves(data, place=""):
    """Return the value at each place of nested dictionaries."""
    if not isinstance(data, dict) or not data:
        return {place: data}
    found = {}
    for key, value in data.items():
        found |= leaves(value, f"{place}.{key}".lstrip("."))
    return found


def test_the_compose_files_agree_but_for_where_the_image_comes_from():
    local, registry = (leaves(read(file)) for file in COMPOSE)
    differ = {
        place for place in {*local, *registry} if local.get(place, ...) != registry.get(place, ...)
    }
    image = {f"services.web.{key}" for key in ("build", "image", "pull_policy", "develop.watch")}
    assert differ == image, f"the Compose files do not agree: they differ in {differ ^ image} too"


@pytest.mark.parametrize("service", ["web", "redis"])
def test_the_swarm_has_what_compose_has_as_far_as_swarm_knows_it(service):
    compose, swarm = (said(file, f"services.{service}") for file in (REGISTRY, STACK))
    unknown = {"depends_on", "container_name", "restart", "security_opt"}
    elsewhere = {"mem_limit", "pids_limit", "pull_policy"}
    lost = compose.keys() - swarm.keys() - unknown - elsewhere
    assert not lost, f"{service} under Swarm lacks what Compose gives it: {lost}"


def test_redis_writes_under_swarm_as_under_compose():
    script = said(STACK, "services.redis.command")[-1]
    (start,) = re.findall(r"exec (.*) - <<", script)
    assert shlex.split(start) == shlex.split(APPEND_ONLY), f"Redis' start in {STACK} is {start}"


@pytest.mark.parametrize("file", [REGISTRY, STACK])
def test_works_alone_on_a_machine_that_has_only_this_file(file):
    keys = set(itertools.chain(*(place.split(".") for place in leaves(read(file)))))
    needs = keys & {"build", "env_file", "extends", "include", "configs", "file"}
    assert not needs, f"{file} needs more than itself: it has {needs}"
