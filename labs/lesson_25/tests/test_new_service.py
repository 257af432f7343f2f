"""new_service.py makes a repository for a service of one's own, without the lesson."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from harness import PROJECT


def new_service(*arguments, **environment):
    command = [sys.executable, PROJECT / "new_service.py", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["redis", "null"])
def test_service_has_its_own_names_only(name, tmp_path):
    folder = tmp_path / "service"
    made = new_service(name.upper(), "AcMe", folder)
    assert f"NAME is changed to {name}" in made.stdout, made.stderr
    text = subprocess.check_output(["git", "grep", "^"], cwd=folder, text=True)  # with file names
    left = [line for line in text.splitlines() if re.search("(?i)lab25|lesson|vlrrbn", line)]
    assert not left, f"words of the lesson: {left}"
    for file in folder.glob("**/*.md"):
        for target in re.findall(r"\]\((?!\w+:)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file}: the link to {target} is broken"
    stack = yaml.safe_load((folder / "compose/docker-compose.registry.yml").read_text())
    web = stack["services"]["web"]
    assert stack["name"] == name
    assert web["container_name"] == f"{name}-web", "Redis has to be the only host called redis"
    assert web["image"].endswith(f"/${{GHCR_OWNER:-acme}}/{name}:${{IMAGE_TAG:-dev}}")
    assert "${REDIS_PORT" not in web["ports"][0], "the service has a REDIS_PORT of its own"


def test_tests_of_service_are_found_and_pass(tmp_path):
    new_service("a", "acme", tmp_path / "service")
    command = [sys.executable, "-m", "pytest", "-k", "test_files"]
    tests = subprocess.run(command, cwd=tmp_path / "service", capture_output=True, text=True)
    assert tests.returncode == 0, tests.stdout


@pytest.mark.parametrize(
    ("name", "owner", "folder", "reason"),
    [
        ("my_api", "acme", "new", "NAME must be"),
        ("3d", "acme", "new", "NAME must be"),
        ("api-", "acme", "new", "NAME must be"),
        ("thirty-one-letters-and-digits-1", "acme", "new", "NAME must be"),
        ("api", "ac me", "new", "OWNER must be"),
        ("api", "acme", "", "FOLDER must not exist"),
        ("api", "acme", "missing/new", "Cannot create"),
        ("api", "acme", "new", "Cannot create"),  # the commit fails
    ],
)
def test_failure_leaves_no_file(name, owner, folder, reason, tmp_path):
    failed = new_service(name, owner, tmp_path / folder, GIT_AUTHOR_DATE="not a date")
    assert failed.returncode == 1
    error = failed.stderr.splitlines()[-1]
    assert error.startswith(reason), error
    assert not list(tmp_path.iterdir())
