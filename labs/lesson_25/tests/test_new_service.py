"""new_service.py makes a repository for a service of one's own, without the lesson."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from harness import PROJECT

LONGEST = "thirty-letters-and-digits-as-1"


def run_python(*arguments, **environment):
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=ours | environment, capture_output=True, text=True)


def new_service(*arguments, **environment):
    return run_python(PROJECT / "new_service.py", *arguments, **environment)


@pytest.mark.parametrize("name", ["a", LONGEST, "redis", "redis-app", "null"])
def test_service_has_its_own_names_only(name, tmp_path):
    folder = tmp_path / "service"
    made = new_service(name.title(), "AcMe", folder)
    assert f"NAME is changed to {name}" in made.stdout, made.stderr
    files = subprocess.check_output(["git", "ls-files"], cwd=folder, text=True).split()
    text = "\n".join(f"{file}:\n{(folder / file).read_text()}" for file in files)
    words = re.compile("lab25|lesson|vlrrbn", re.IGNORECASE)
    left = [line for line in text.splitlines() if words.search(line)]
    assert not left, f"words of the lesson: {left}"
    for file in folder.glob("**/*.md"):
        for target in re.findall(r"\]\((?!\w+:)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file}: the link to {target} is broken"
    for file in folder.glob("**/*.py"):
        compile(file.read_text(), file, "exec")
    stack = yaml.safe_load((folder / "compose/docker-compose.registry.yml").read_text())
    web = stack["services"]["web"]
    assert stack["name"] == name
    assert web["container_name"] == f"{name}-web", "Redis has to be the only host called redis"
    assert web["image"].endswith(f"/${{GHCR_OWNER:-acme}}/{name}:${{IMAGE_TAG:-dev}}")
    assert "${REDIS_PORT" not in web["ports"][0], "the service has a REDIS_PORT of its own"


def test_tests_of_service_are_found_and_pass(tmp_path):
    folder = tmp_path / "service"
    new_service("my-api", "acme", folder)
    tests = run_python("-m", "pytest", "-k", "test_files", f"--rootdir={folder}", folder / "tests")
    assert tests.returncode == 0, tests.stdout


@pytest.mark.parametrize(
    ("name", "owner", "folder", "reason"),
    [
        ("my_api", "acme", "new", "NAME must be"),
        ("3d", "acme", "new", "NAME must be"),
        ("api-", "acme", "new", "NAME must be"),
        (f"{LONGEST}2", "acme", "new", "NAME must be"),
        ("api", "ac me", "new", "OWNER must be"),
        ("api", "acme", "", "FOLDER must not exist"),
        ("api", "acme", "missing/new", "Cannot make"),
    ],
)
def test_bad_argument_is_rejected_before_anything_is_written(name, owner, folder, reason, tmp_path):
    rejected = new_service(name, owner, tmp_path / folder)
    assert rejected.returncode == 1
    (line,) = rejected.stderr.splitlines()
    assert reason in line
    assert not list(tmp_path.iterdir())


def test_failure_leaves_no_folder(tmp_path):
    failed = new_service("api", "acme", tmp_path / "new", GIT_AUTHOR_DATE="not a date")
    assert failed.returncode == 1
    assert not list(tmp_path.iterdir())
