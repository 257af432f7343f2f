"""What the Compose files and the stack file promise to each other, read as data."""

import re
import shlex

import yaml

from harness.checklist import REPOSITORY


def read(path):
    return yaml.safe_load((REPOSITORY / path).read_text())


def test_the_two_stacks_agree_but_for_where_the_image_comes_from():
    local = read("labs/lesson_25/compose/docker-compose.yml")
    registry = read("labs/lesson_25/compose/docker-compose.registry.yml")
    assert local["services"]["web"].pop("build") == "../app"
    assert local["services"]["web"].pop("image") == "lab25-web:dev"
    assert local["services"]["web"].pop("develop")["watch"] == [
        {"action": "rebuild", "path": "../app"}
    ]
    image = "${REGISTRY:-ghcr.io}/${GHCR_OWNER:-vlrrbn}/lab25-web:${IMAGE_TAG:-dev}"
    assert registry["services"]["web"].pop("image") == image
    assert registry["services"]["web"].pop("pull_policy") == "always"
    assert local == registry


def test_the_swarm_stack_says_the_same_but_for_what_swarm_cannot():
    """Swarm has no container names, no conditions to wait for and no no-new-privileges; limits have their place."""
    one, many = (
        read(f"labs/lesson_25/compose/docker-{name}.yml") for name in ("compose.registry", "stack")
    )
    start, password = many["services"]["redis"]["command"][2].splitlines()[:2]
    assert shlex.split(start)[1:-2] == one["services"]["redis"]["command"] and password.startswith(
        "requirepass "
    )
    for service in ("web", "redis"):
        here, there = one["services"][service], many["services"][service]
        assert here.keys() - there.keys() - {"depends_on", "pull_policy"} == {
            *("container_name", "restart", "security_opt", "mem_limit", "pids_limit")
        }
        limits = there["deploy"]["resources"]["limits"]
        assert (limits["memory"], limits["pids"]) == (here["mem_limit"], here["pids_limit"])
        same = here.keys() & there.keys() - {"environment", "ports", "command", "healthcheck"}
        assert {"image", "networks", "read_only", "cap_drop", "logging"} <= same
        assert {key: here[key] for key in same} == {key: there[key] for key in same}
    assert set(many["networks"]["backend"]["driver_opts"]) == {"encrypted"}
    assert not re.search(r"build|env_file|extends|include|\./", str(many))
