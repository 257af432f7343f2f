"""Files that are data: what no other test sees broken, and what two files must have in common."""

import re
import shlex
import subprocess

import pytest
import yaml
from packaging.requirements import Requirement

from harness import PROJECT, REPOSITORY

LOCAL, REGISTRY, PASSWORD, STACK = (
    f"{PROJECT.relative_to(REPOSITORY)}/compose/docker-{name}.yml"
    for name in ("compose", "compose.registry", "compose.password", "stack")
)
WORKFLOW = ".github/workflows/docker-image-lab25.yml"
WEEKLY = ".github/workflows/weekly-lab25.yml"
DEPENDABOT = ".github/dependabot.yml"
LISTS = sorted({REPOSITORY / ".ci/requirements.in", *PROJECT.glob("*/requirements.in")})
ABSENT = "absent"

SYNCED = ["redis-server", "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
REBUILD = [{"action": "rebuild", "path": "../app"}]
UPDATE = {"order": "start-first", "delay": "10s", "monitor": "30s", "failure_action": "rollback"}
PORT = "${LAB25_PORT:-8080}:8080"
IMAGE = "lab25-web:${IMAGE_TAG:-dev}"
AUTHORS_IMAGE = "${REGISTRY:-ghcr.io}/${GHCR_OWNER:-vlrrbn}/" + IMAGE
SECRET = "secrets.redis_password.external"
GROUP = "lab25-image-${{ github.ref }}"
TRIED_DIGEST = "${{ needs.build.outputs.digest }}"
ONLY_PULL_REQUESTS = "${{ github.event_name == 'pull_request' }}"

# A file, a place in it, the value that must be there, and the requirement that it meets.
REQUIREMENTS = [
    (LOCAL, "web.ports", [f"127.0.0.1:{PORT}"], "only this machine reaches web"),
    (LOCAL, "web.depends_on.redis.condition", "service_healthy", "web waits for Redis"),
    (LOCAL, "web.restart", "unless-stopped", "web restarts after a crash"),
    (LOCAL, "web.init", True, "web stops at once during its startup"),
    (LOCAL, "web.logging.driver", "local", "the log of web does not fill the disk"),
    (LOCAL, "web.develop.watch", REBUILD, "`docker compose watch` rebuilds a changed app"),
    (LOCAL, "redis.ports", ABSENT, "only containers reach Redis"),
    (LOCAL, "redis.command", SYNCED, "Redis syncs each write to disk"),
    (LOCAL, "redis.init", True, "health checks of Redis leave no zombie"),
    (LOCAL, "redis.logging.driver", "local", "the log of Redis does not fill the disk"),
    (REGISTRY, "web.image", AUTHORS_IMAGE, "the author's image is the default"),
    (STACK, "web.healthcheck", {"interval": "3s"}, "a failure after 8 s is seen in time"),
    (STACK, "web.deploy.replicas", 2, "one task answers if the other fails"),
    (STACK, "web.deploy.update_config", UPDATE, "an update keeps a good task"),
    (STACK, "web.deploy.rollback_config.order", "start-first", "a rollback keeps a task"),
    (STACK, "redis.ports", ABSENT, "only containers reach Redis"),
    (STACK, "redis.deploy.replicas", ABSENT, "there is one Redis"),
    (STACK, "redis.deploy.endpoint_mode", "dnsrr", "idle connections to Redis stay open"),
    (STACK, SECRET, True, "no file has the password"),
    (STACK, "networks.backend.driver_opts.encrypted", "true", "traffic of nodes is encrypted"),
    (WORKFLOW, "on.push.branches", ["main"], "each push to main is tested"),
    (WORKFLOW, "on.push.tags", ["v[0-9]+.[0-9]+.[0-9]+"], "each release starts a run"),
    (WORKFLOW, "on.push.paths", ABSENT, "no path filter skips a required check"),
    (WORKFLOW, "on.pull_request", None, "each pull request is tested"),
    (WORKFLOW, "on.merge_group", None, "a required check reports to the merge queue"),
    (WORKFLOW, "on.schedule", ABSENT, "no schedule disables publishing"),
    (WORKFLOW, "concurrency.group", GROUP, "runs of a branch wait"),
    (WORKFLOW, "concurrency.cancel-in-progress", ONLY_PULL_REQUESTS, "no publishing is cancelled"),
    (WORKFLOW, "defaults.run.shell", "bash", "a failure in a pipe fails the step"),
    (WORKFLOW, "jobs.build.needs", "test", "no image is built if a test fails"),
    (WORKFLOW, "jobs.publish.env.DIGEST", TRIED_DIGEST, "the tried image gets the tags"),
    (WEEKLY, "on.schedule", [{"cron": "23 4 * * 1"}], "main is built each Monday"),
]


def read(file):
    """Return the data of a YAML file, with each service of a stack at the top too."""
    data = yaml.safe_load((REPOSITORY / file).read_text())
    data["on"] = data.get(True, ABSENT)  # YAML takes a workflow's `on` for a boolean
    return {**data, **data.get("services", {})}


def value_at(place, data):
    """Return the value at a dotted place of nested dictionaries, or ABSENT."""
    for key in place.split("."):
        if not isinstance(data, dict) or key not in data:
            return ABSENT
        data = data[key]
    return data


@pytest.mark.parametrize(
    ("file", "place", "value", "requirement"),
    [pytest.param(*row, id=f"{row[0].rpartition('/')[2]}-{row[1]}") for row in REQUIREMENTS],
)
def test_file_meets_requirement(file, place, value, requirement):
    seen = value_at(place, read(file))
    assert seen == value, f"{requirement}: {place} in {file} must be {value!r}, got {seen!r}"


# The stacks


def test_compose_files_differ_only_in_image_source():
    local, registry = read(LOCAL), read(REGISTRY)
    for file in (local, registry):
        for key in ("build", "image", "pull_policy", "develop"):
            file["services"]["web"].pop(key, None)
    assert local == registry, "the Compose files differ in more than the source of the image"


@pytest.mark.parametrize(
    ("service", "differs"), [("web", ["environment", "image", "ports"]), ("redis", ["volumes"])]
)
def test_swarm_service_has_settings_of_compose(service, differs):
    compose, swarm = (read(file)[service] for file in (REGISTRY, STACK))
    swarm["mem_limit"] = value_at("deploy.resources.limits.memory", swarm)
    swarm["pids_limit"] = value_at("deploy.resources.limits.pids", swarm)
    if service == "redis":
        swarm["healthcheck"]["test"] = compose["healthcheck"]["test"]  # it needs a user there
        (options,) = re.findall(r"exec (.*) - <<", swarm["command"][-1])
        swarm["command"] = shlex.split(options)
    ignored_by_swarm = {"container_name", "depends_on", "pull_policy", "restart", "security_opt"}
    for key in compose.keys() - ignored_by_swarm - set(differs):
        seen = swarm.get(key, ABSENT)
        assert seen == compose[key], f"{key} of {service}: {compose[key]!r}, but {seen!r} in Swarm"


@pytest.mark.parametrize(
    "place",
    [
        "redis.command",
        "redis.healthcheck.test",
        "redis.secrets",
        "web.secrets",
        "web.environment.REDIS_PASSWORD_FILE",
    ],
)
def test_password_overlay_agrees_with_stack_file(place):
    overlay, stack = (value_at(place, read(file)) for file in (PASSWORD, STACK))
    assert overlay == stack != ABSENT, f"{place} under Compose: {overlay!r}, under Swarm: {stack!r}"


@pytest.mark.parametrize("file", [REGISTRY, STACK])
def test_stack_file_needs_no_other_file(file):
    text = (REPOSITORY / file).read_text()
    needs = re.findall(r"(?m)^ *(build|env_file|extends|include|configs|file):", text)
    assert not needs, f"{file} must be enough on a machine, but it has {needs}"


def test_git_ignores_password_file_and_settings():
    names = ["secrets/redis_password", ".env"]
    ignored = subprocess.run(
        ["git", "check-ignore", *names], cwd=PROJECT / "compose", text=True, capture_output=True
    )
    assert ignored.stdout.split() == names, f"git must ignore {names}, ignores {ignored.stdout!r}"


# The lists of packages


@pytest.mark.parametrize("short_list", LISTS, ids=lambda path: path.parent.name)
def test_lock_covers_its_short_list(short_list):
    lines = [line.partition("#")[0].strip() for line in short_list.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line and not line.startswith("-")]
    locked = {}
    for entry in re.split(r"\n(?=\w)", short_list.with_suffix(".txt").read_text()):
        package = re.match(r"(\S+)==(\S+)", entry)
        if package and "-r requirements.in" in entry:
            locked[package[1]] = package[2]
    names = {one.name for one in wanted}
    assert locked.keys() == names, f"the lock of {short_list} was made from another list: {locked}"
    for one in wanted:
        version = locked[one.name]
        assert version in one.specifier, f"{short_list} requires {one}, the lock has {version}"


def test_dependabot_updates_each_list_and_tests_with_app():
    updates = read(DEPENDABOT)["updates"]
    seen = {
        (update["package-ecosystem"], *update.get("directories", [update.get("directory")]))
        for update in updates
    }
    linters, *project = [f"/{file.parent.relative_to(REPOSITORY).as_posix()}" for file in LISTS]
    expected = {("github-actions", "/"), ("uv", linters), ("uv", *project)}
    assert seen == expected, f"Dependabot must watch {expected}, watches {seen}"
