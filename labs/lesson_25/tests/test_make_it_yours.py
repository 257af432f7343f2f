"""*Make it yours* in the README, followed in a copy: a repository that works without the lesson."""

import os
import secrets
import shutil
import subprocess
import sys

import pytest

from harness import REPOSITORY, texts
from harness.clients import get
from harness.engine import docker, free_port

OWNER = "acme"
LESSONS_WORDS = "lab25|lesson|vlrrbn"
AUTHOR = {
    "GIT_AUTHOR_NAME": "A Reader",
    "GIT_AUTHOR_EMAIL": "reader@example.com",
    "GIT_COMMITTER_NAME": "A Reader",
    "GIT_COMMITTER_EMAIL": "reader@example.com",
}
PYTEST = f"{sys.executable} -m pytest -q -p no:cacheprovider"


def run(command, folder, what):
    """Run a command as a reader's shell would and return its output; fail with `what` it shows."""
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**environment, **AUTHOR},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, (
        f"{what}: status {result.returncode} of\n{command}\n{result.stdout}"
    )
    return result.stdout


def clone_of_this(folder):
    """Make a repository with one commit: all that git knows here or would add."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for file in subprocess.check_output(listing, cwd=REPOSITORY, text=True).splitlines():
        if (REPOSITORY / file).exists():
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / file, target)
    run("git init -q && git add . && git commit -q -m clone", folder, "no clone could be made")


class NewRepository:
    """What the README's first two steps make, under a name that is this run's own."""

    def __init__(self, parent):
        # As long as `orders`, because the length of lines is a matter for the linters.
        self.name = f"o{secrets.token_hex(3)[:5]}"
        self.folder = parent / f"{self.name}-api"
        (section,) = [one for one in texts.sections("README.md") if one.heading == "Make it yours"]
        steps = [self._own(block.body) for block in section.blocks if block.kind == "sh"]
        choose, copy, self.check, self.start = steps
        clone_of_this(parent / "clone")
        run(choose + copy, parent / "clone", "*Make it yours* cannot be followed")

    def _own(self, command):
        own = command.replace("orders", self.name).replace("ORDERS", self.name.upper())
        return own.replace("your-name", OWNER)


@pytest.fixture(scope="module")
def yours(tmp_path_factory):
    return NewRepository(tmp_path_factory.mktemp("yours"))


def test_nothing_in_it_is_named_after_the_lesson(yours):
    lines = f"git grep -niE '{LESSONS_WORDS}' || true"
    names = f"git ls-files | grep -iE '{LESSONS_WORDS}' || true"
    left = run(f"{lines}; {names}", yours.folder, "the new repository cannot be searched")
    assert not left, f"the new repository still has words of the lesson:\n{left}"


def test_its_tests_are_found_and_those_of_its_stacks_and_texts_pass(yours):
    choice = '-m "not engine" -k "test_stack_files or test_texts"'
    what = "a test of the new repository cannot be read, or fails"
    passed = run(f"{PYTEST} -rp {choice}", yours.folder, what)
    for text in ("README.md", "app/README.md", "compose/README.md", "tests/README.md"):
        assert f"[{text}]" in passed, f"the new repository's tests do not read its {text}"


@pytest.mark.slow
def test_its_linters_and_all_its_tests_without_an_engine_are_content(yours):
    lint, test = yours.check.splitlines()[:2]
    run(lint, yours.folder, "the linters find something in the new repository")
    assert "pytest" in test, f"the third step runs no tests: {test}"
    without_engine = f'{PYTEST} -m "not engine and not slow and not timing"'
    run(without_engine, yours.folder, "a test of the new repository fails")


@pytest.mark.engine
def test_its_stack_counts_by_itself_beside_the_lessons(yours, stack):
    before = stack.hits()
    port = free_port()
    end = "docker compose -f compose/docker-compose.yml down --volumes --rmi local"
    try:
        what = "the new repository's stack does not start"
        answer = run(yours.start.replace("8081", str(port)), yours.folder, what)
        assert '"hit_count":1,' in answer, (
            f"the new stack's first hit is not its number 1: {answer}"
        )
        assert get(port, "/health").json["redis_ok"], "the new stack's Redis does not answer"
        running = docker("ps", "--filter", f"name={yours.name}", "--format", "{{.Names}}").stdout
        assert set(running.split()) == {f"{yours.name}-api", f"{yours.name}-redis"}, (
            f"the new stack's containers have other names: {running}"
        )
        volume = f"{yours.name}_redis_data"
        volumes = docker("volume", "ls", "--quiet", "--filter", f"name={volume}").stdout.split()
        assert volumes == [volume], f"the new stack's count is in no volume called {volume}"
        assert stack.hits() == before + 1, "the lesson's stack did not go on counting beside it"
    finally:
        run(end, yours.folder, "the new repository's stack cannot be ended")
