"""The lesson and the README: their commands work, print what the text shows, and prove what the boxes claim."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

import checklist
from checklist import REPOSITORY
from engine import RUN, docker, free_port, remove_images

TEXTS = ["lesson_25.md", "README.md"]
REASONS = {"never ends", "needs GitHub", "needs a swarm", "runs the tests", "runs the benchmark"}
BLOCK = re.compile(r"^(?:<!-- (?P<mark>.*?) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)


def blocks(text):
    """Return the (mark, kind, body) of each fenced block of a text, in order."""
    content = (REPOSITORY / text).read_text(encoding="utf-8")
    return [(match["mark"] or "", match["kind"], match["body"]) for match in BLOCK.finditer(content)]


# The boxes


def test_every_box_names_a_test_that_exists():
    assert len(checklist.boxes()) >= 10
    for claim, tests in checklist.boxes():
        assert tests, f"no test proves: {claim}"
        for test in tests:
            path, name = test.split("::")
            functions = [node.name for node in ast.parse((REPOSITORY / path).read_text()).body if hasattr(node, "name")]
            assert name in functions, f"{test} does not exist, though it shall prove: {claim}"


def test_a_run_ends_with_the_boxes():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "labs/lesson_25/tests/test_files.py"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert "[x] A pull request publishes nothing, " in shown
    assert "[ ] It runs as `appuser`, not as root (not run)\n" in shown


# What is shown


@pytest.mark.parametrize("text", TEXTS)
def test_every_file_shown_is_the_file(text):
    for mark, kind, body in blocks(text):
        assert kind in {"sh", "text", "mermaid", "python", "yaml", "dockerfile"}, f"what is a {kind!r} block?"
        if kind in {"python", "yaml", "dockerfile"}:
            path = re.fullmatch(r"from: (\S+)", mark)
            assert path, f"which file is this of?\n{body}"
            assert body in (REPOSITORY / path[1]).read_text(), f"{path[1]} does not say\n{body}"


@pytest.mark.parametrize("text", TEXTS)
def test_every_command_left_out_says_why(text):
    for mark, kind, body in blocks(text):
        if kind == "sh" and mark not in {"", "fails", "test"}:
            assert mark.removeprefix("not run: ") in REASONS, f"{mark}\n{body}"


# What is run


@pytest.fixture
def own_copy(tmp_path, registry, monkeypatch):
    """A clean copy of the repository under the tests' own names, port and registry, and the words it changes."""
    port = free_port()
    monkeypatch.setenv("PORT", str(port))  # for the app without Docker; the Compose files do not hand it on
    words = {
        "lab25-web": f"{RUN}-text-web",
        "lab25-redis": f"{RUN}-text-redis",
        "name: lab25\n": f"name: {RUN}-text\n",
        "127.0.0.1:8080": f"127.0.0.1:{port}",
        "LAB25_PORT:-8080": f"LAB25_PORT:-{port}",
        "ghcr.io": registry.address,
        "your-name": registry.user,
        "your-nam": registry.user[:-1],
    }
    copy = tmp_path / "lesson_25"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")[:-1]
    for file in files:
        target = copy / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / file, target)
        if file.startswith(("labs/lesson_25/app", "labs/lesson_25/compose")):
            target.write_text(renamed(target.read_text(), words))
    yield copy, words
    for container in (f"{RUN}-text-web", f"{RUN}-text-redis"):
        docker("rm", "--force", container)
    docker("volume", "rm", "--force", f"{RUN}-text_redis_data")
    docker("network", "rm", f"{RUN}-text_backend", check=False)
    remove_images(f"{RUN}-text")
    remove_images(registry.address)


def renamed(text, words):
    for word, own in words.items():
        text = text.replace(word, own)
    return text


def matches(expected, output):
    """Return the first line of `expected` that is missing in `output`, in order, or None; … stands for anything."""
    lines = iter(output.splitlines())
    for line in expected.splitlines():
        pattern = re.compile(".*".join(map(re.escape, line.split("…"))))
        if not any(pattern.fullmatch(shown.rstrip()) for shown in lines):
            return line
    return None


@pytest.mark.engine
@pytest.mark.parametrize("text", TEXTS)
def test_every_command_works_and_prints_what_the_text_shows(text, own_copy, registry):
    copy, words = own_copy
    environment = {
        **registry.logged_out(),
        "GHCR_OWNER": registry.user,
        "GHCR_TOKEN": registry.password,
    }
    state = copy.parent / "state"
    state.touch()
    output = None
    for mark, kind, body in blocks(text):
        if kind == "sh" and mark in ("", "fails"):
            result = subprocess.run(
                [
                    "bash",
                    "-euo",
                    "pipefail",
                    "-c",
                    f"source {state}; trap 'export -p >{state}' EXIT\n{renamed(body, words)}",
                ],
                cwd=copy,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
            )
            output = result.stdout
            assert (result.returncode != 0) == (mark == "fails"), f"{text}:\n{body}\nended with {output}"
        elif kind == "sh":
            output = None
        elif kind == "text" and output is not None:
            missing = matches(renamed(body, words), output)
            assert missing is None, f"{text} shows\n{missing}\nbut its command prints\n{output}"
