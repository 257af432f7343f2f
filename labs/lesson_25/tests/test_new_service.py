"""new_service.py makes a repository for a service, without the lesson."""

import pathlib
import subprocess
import sys

import pytest
import yaml

from harness import PROJECT

LONGEST = "a-service-with-thirty-letters1"
NAMES = ["a", LONGEST, "redis-app", "my-api", "redis", "null"]


def new_service(*arguments):
    command = [sys.executable, PROJECT / "new_service.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_service_has_only_its_own_names(name, tmp_path):
    folder = tmp_path / "service"
    made = new_service(name.title(), "AcMe", folder)
    assert made.returncode == 0, f"{made.stdout}{made.stderr}"
    assert f"NAME is changed to {name}" in made.stdout
    files = subprocess.check_output(["git", "ls-files"], cwd=folder, text=True).splitlines()
    texts = {file: (folder / file).read_text() for file in files}
    for file, text in texts.items():
        for word in ("lab25", "lesson", "vlrrbn"):
            assert word not in f"{file}\n{text}".lower(), f"{file} has the word {word}"
        if file.endswith(".py"):
            compile(text, file, "exec")
    stack = yaml.safe_load(texts["compose/docker-compose.registry.yml"])
    web = stack["services"]["web"]
    assert stack["name"] == name
    assert web["image"] == f"${{REGISTRY:-ghcr.io}}/${{GHCR_OWNER:-acme}}/{name}:${{IMAGE_TAG:-dev}}"
    assert web["container_name"] == f"{name}-web", "only Redis can have the host name redis"
    assert "${REDIS_PORT" not in web["ports"][0], "REDIS_PORT is the port of the service's Redis"
    assert texts["README.md"].startswith(f"# {name}\n")


@pytest.mark.parametrize(
    ("name", "owner", "folder", "reason"),
    [
        ("my_api", "acme", "new", "NAME must be"),
        ("9-lives", "acme", "new", "NAME must be"),
        ("api-", "acme", "new", "NAME must be"),
        (LONGEST + "2", "acme", "new", "NAME must be"),
        ("api", "ac me", "new", "OWNER must be"),
        ("api", "acme", "missing/new", "No such file"),
        ("api", "acme", ".", "File exists"),
    ],
)
def test_bad_argument_is_refused_and_leaves_nothing(name, owner, folder, reason, tmp_path):
    refused = new_service(name, owner, tmp_path / folder)
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
