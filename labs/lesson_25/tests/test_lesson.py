"""The lesson and the README: their commands work, print what the text shows, and prove what the boxes claim."""

import ast
import contextlib
import http.client
import http.server
import os
import re
import shutil
import subprocess
import sys

import pytest
from test_swarm import kernel_lacks

from harness import checklist
from harness.checklist import REPOSITORY
from harness.clients import FAILURES, eventually, serving
from harness.engine import REDIS, RUN, container, docker, free_port, remove_images

TEXTS = ["lesson_25.md", "README.md"]
REASONS = {"never ends", "needs GitHub", "needs a swarm", "runs the tests", "runs the benchmark"}
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>.*?) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)


def content(text):
    return (REPOSITORY / text).read_text(encoding="utf-8")


def blocks(content):
    """Return the (mark, kind, body) of each fenced block, in order."""
    return [
        (match["mark"] or "", match["kind"], match["body"]) for match in BLOCK.finditer(content)
    ]


# The boxes


def test_every_box_names_a_test_that_exists_or_is_the_readers():
    assert len(checklist.boxes()) >= 10
    for claim, tests in checklist.boxes():
        assert bool(tests) != claim.startswith("My "), (
            f"a test proves it, or the reader sees it: {claim}"
        )
        for test in tests:
            path, name = test.split("::")
            functions = [
                node.name
                for node in ast.parse((REPOSITORY / path).read_text()).body
                if hasattr(node, "name")
            ]
            assert name in functions, f"{test} does not exist, though it shall prove: {claim}"


def test_a_run_ends_with_the_boxes():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "labs/lesson_25/tests/test_workflow.py",
    ]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert "[x] A pull request publishes nothing, " in shown
    assert "[ ] It runs as `appuser`, not as root (not run)\n" in shown


# What is shown


@pytest.mark.parametrize("text", TEXTS)
def test_every_file_shown_is_the_file(text):
    for mark, kind, body in blocks(content(text)):
        assert kind in {"sh", "text", "mermaid", "python", "yaml", "dockerfile"}, (
            f"what is a {kind!r} block?"
        )
        if kind in {"python", "yaml", "dockerfile"}:
            path = re.fullmatch(r"from: (\S+)", mark)
            assert path, f"which file is this of?\n{body}"
            assert body in (REPOSITORY / path[1]).read_text(), f"{path[1]} does not say\n{body}"


@pytest.mark.parametrize("text", TEXTS)
def test_every_command_left_out_says_why(text):
    for mark, kind, body in blocks(content(text)):
        if kind == "sh" and mark not in {"", "fails", "test"}:
            assert mark.removeprefix("not run: ") in REASONS, f"{mark}\n{body}"


def test_what_the_reader_shall_break_is_there():
    app = (REPOSITORY / "labs/lesson_25/app/app.py").read_text()
    lines = re.findall(
        r"sed -i\.bak 's/(.*?)/.*/' labs/lesson_25/app/app\.py", content("lesson_25.md")
    )
    assert [app.count(line) for line in lines] == [1, 1]


def test_the_sizes_in_the_lesson_are_those_of_the_benchmark():
    row = r"layers over the base image, unpacked \| ([\d.]+) MB \| (\d+) MB"
    ours, single_stage = re.search(row, content("README.md")).groups()
    assert f"Over {int(single_stage) // 100}00 MB became some {float(ours):.0f}." in content(
        "lesson_25.md"
    )


# What is run


@pytest.fixture
def own_copy(tmp_path, registry, monkeypatch):
    """A clean copy of the repository under the tests' own names, port and registry, and the words it changes."""
    port = free_port()
    monkeypatch.setenv(
        "PORT", str(port)
    )  # for the app without Docker; the Compose files do not hand it on
    words = {
        "lab25-web": f"{RUN}-text-web",
        "lab25-redis": f"{RUN}-text-redis",
        "name: lab25\n": f"name: {RUN}-text\n",
        "127.0.0.1:8080": f"127.0.0.1:{port}",
        "6380": str(free_port()),
        "LAB25_PORT:-8080": f"LAB25_PORT:-{port}",
        "ghcr.io": registry.address,
        "your-name": registry.user,
        "your-nam": registry.user[:-1],
    }
    copy = tmp_path / "lesson_25"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for file in subprocess.check_output(listing, cwd=REPOSITORY, text=True).splitlines():
        target = copy / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / file, target)
        if file.startswith(("labs/lesson_25/app", "labs/lesson_25/compose")):
            target.write_text(renamed(target.read_text(), words))
    yield copy, words
    docker("rm", "--force", f"{RUN}-text-web", f"{RUN}-text-redis")
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


# Where GHCR has other words than this registry, the text shows GHCR's.
GHCR_SAYS = {
    "no basic auth credentials": "denied",
    ":by-hand: not found": ": denied",
    "manifest unknown": "denied",
}


def run_blocks(blocks, copy, words, environment):
    """Run each sh block in a shell that knows the variables of those before it; compare what it prints with the text.

    A text block belongs to the sh block before it. Both are read with the words that this copy changes.
    """
    state = copy.parent / "state"
    state.touch()
    prelude = f"exec </dev/null 2>&1; source {state}; trap 'export -p >{state}' EXIT\n"
    output = None
    for mark, kind, body in blocks:
        if kind == "sh" and mark in ("", "fails"):
            command = ["bash", "-euo", "pipefail", "-c", prelude + renamed(body, words)]
            result = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300
            )
            output = renamed(result.stdout, GHCR_SAYS)
            assert (result.returncode != 0) == (mark == "fails"), (
                f"{body}\nended with {result.returncode}:\n{output}"
            )
        elif kind == "sh":
            output = None
        elif kind == "text" and output is not None:
            missing = matches(renamed(body, words), output)
            assert missing is None, f"shown is\n{missing}\nbut the command prints\n{output}"


@pytest.mark.engine
@pytest.mark.parametrize("text", TEXTS)
def test_every_command_works_and_prints_what_the_text_shows(text, own_copy, registry):
    environment = {
        **registry.logged_out(),
        "GHCR_OWNER": registry.user,
        "GHCR_TOKEN": registry.password,
    }
    without_swarm = re.sub(r"(?ms)^## Part 7:.*?(?=^## )", "", content(text))
    run_blocks(blocks(without_swarm), *own_copy, environment)


# A swarm of one


@contextlib.contextmanager
def mesh(node, port):
    """Listen on `port` in place of Swarm's routing mesh: hand each request to the first task that takes it."""
    (network,) = node.inspect()["NetworkSettings"]["Networks"].values()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            published = node.run("docker", "ps", "--format", "{{.Ports}}").stdout
            for port in re.findall(r"0\.0\.0\.0:(\d+)->8080", published):
                connection = http.client.HTTPConnection(network["IPAddress"], int(port), timeout=5)
                with contextlib.suppress(*FAILURES), contextlib.closing(connection):
                    connection.request("GET", self.path, headers={"Host": self.headers["Host"]})
                    answer = connection.getresponse()
                    self.send_response(answer.status)
                    self.end_headers()
                    return self.wfile.write(answer.read())

    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)):
        yield


@pytest.mark.engine
@pytest.mark.slow
def test_every_command_for_a_swarm_works_in_an_engine_of_its_own(
    own_copy, registry, image, tmp_path
):
    """A kernel without IPVS has no routing mesh: there the port's line is changed, and the mesh is the test's."""
    copy, words = own_copy
    port = int(words["127.0.0.1:8080"].rpartition(":")[2])
    options = ["--privileged", "--volume", f"{copy}:/copy:ro"]
    if without_ipvs := "IPVS" in kernel_lacks(image):
        file = copy / "labs" / "lesson_25" / "compose" / "docker-stack.yml"
        line = f'- "${{LAB25_PORT:-{port}}}:8080"'
        assert line in file.read_text()
        file.write_text(file.read_text().replace(line, "- {target: 8080, mode: host}"))
    else:
        options += ["--publish", f"127.0.0.1:{port}:{port}"]
    with container("docker:28-dind", *options, wait=False) as node:
        docker("start", node.name)
        eventually(lambda: node.run("docker", "info", check=False).returncode == 0, 60)
        command = (
            tmp_path / "bin" / "docker"
        )  # the node's, but for builds, which it has no Buildx for
        command.parent.mkdir()
        real = shutil.which("docker")
        command.write_text(
            f'#!/bin/sh\n[ "$1" = build ] && exec {real} "$@"\n'
            f'exec {real} exec -i -e GHCR_OWNER -e IMAGE_TAG -w /copy {node.name} docker "$@"\n'
        )
        command.chmod(0o755)
        environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}
        part = blocks(re.search(r"(?ms)^## Part 7:.*?(?=^## )", content("lesson_25.md"))[0])
        run_blocks(part[:1], copy, words, environment)
        built = [
            f"{registry.address}/{registry.user}/{RUN}-text-web:{tag}"
            for tag in ("one", "two", "broken")
        ]
        docker("save", "--output", tmp_path / "images.tar", REDIS, *built)
        docker("cp", tmp_path / "images.tar", f"{node.name}:/images.tar")
        node.run("docker", "load", "--input", "/images.tar")
        with mesh(node, port) if without_ipvs else contextlib.nullcontext():
            run_blocks(part[1:], copy, words, environment)
