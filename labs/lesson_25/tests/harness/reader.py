"""A reader who types what the texts say, in a clean copy and under names of the tests' own."""

import concurrent.futures
import contextlib
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess

import pytest

from harness import PROJECT, REPOSITORY
from harness.engine import BASE, CONTEXT, REDIS, RUN, docker, free_port, give_image, remove_all
from harness.swarm import STACK_FILE, adapted, engines, kernel_lacks, mesh

UNITS_AT_ONCE = 2  # beside the other tests; they wait more than they work
MINUTES = {"": 5, "fails": 1}  # for one block, by its mark; what must fail does so soon
SAID_BY_GHCR = "said by GHCR"  # which has other words than the tests' registry
CURL_SECONDS = 30  # for an answer that does not come


# Variables that no block hands to the next.
BASHS_OWN = "^declare -[a-z]*r|^declare -[a-zA-Z-]+ (BASH|LINENO|SECONDS|RANDOM|EPOCH|PPID)"


def longer_waits(commands):
    """Return commands that sleep longer on a busy machine, as what they wait for takes longer."""
    busy = max(1, os.getloadavg()[0] / os.cpu_count())
    return re.sub(
        r"\bsleep (\d+)\b(?!\.)", lambda wait: f"sleep {int(wait[1]) * busy:.1f}", commands
    )


class Reader:
    """One reader of one unit: a copy of the repository, and the words that stand for the text's."""

    def __init__(self, folder, registry, environment):
        self.name = f"{RUN}-{secrets.token_hex(2)}"
        self.registry = registry
        self.port = free_port()
        self.folder = folder / self.name
        self.copy = self.folder / "copy"
        self.words = {
            "lab25-web": f"{self.name}-web",
            "lab25-redis": f"{self.name}-redis",
            "lab25_": f"{self.name}_",
            "name: lab25\n": f"name: {self.name}\n",
            "127.0.0.1:8080": f"127.0.0.1:{self.port}",
            "LAB25_PORT:-8080": f"LAB25_PORT:-{self.port}",
            "LAB25_PORT=8080": f"LAB25_PORT={self.port}",
            "6380": str(free_port()),
            "ghcr.io": registry.address,
            "your-name": registry.user,
            "your-nam": registry.user[:-1],
        }
        self.copy.mkdir(parents=True)
        (self.folder / ".curlrc").write_text(f"max-time = {CURL_SECONDS}\n")
        self.environment = {
            **environment,
            "DOCKER_CONFIG": registry.logged_out()["DOCKER_CONFIG"],
            "CURL_HOME": str(self.folder),
            "GHCR_OWNER": registry.user,
            "GHCR_TOKEN": registry.password,
            "PORT": str(self.port),  # without Docker; the Compose files do not hand it on
        }
        self._started = []
        self._stopped = False

    def own(self, text):
        """Return a text in the words of this reader's copy."""
        for word, own in self.words.items():
            text = text.replace(word, own)
        return text

    def copy_repository(self):
        """Copy what git knows or would add; the product with this reader's own words."""
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for file in subprocess.check_output(listing, cwd=REPOSITORY, text=True).splitlines():
            source, target = REPOSITORY / file, self.copy / file
            if not source.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            if source.parent != REPOSITORY and source.is_relative_to(PROJECT):
                target.write_text(self.own(target.read_text()))

    def read(self, blocks):
        """Run each sh block and compare what it prints with the text blocks after it.

        A block's shell knows the variables and the folder of those before it.
        """
        output, command = None, None
        for block in blocks:
            if block.is_run:
                output, command = self.run(block), block
            elif block.kind == "sh":
                output = None
            elif block.kind == "text" and output is not None and block.mark != SAID_BY_GHCR:
                self.compare(block, command, output)

    def run(self, block):
        """Run an sh block and return what it prints; fail unless it ends as it should."""
        variables, failed, printed = (
            self.folder / name for name in ("variables", "failed", "printed")
        )
        assert not self._stopped, "the run was ended"
        variables.touch()
        failed.write_text("0 ")
        first_line = (
            f'exec </dev/null; source {variables}; cd "$PWD"; '
            f"trap 'declare -p | grep -vE \"{BASHS_OWN}\" >{variables}' EXIT; "
            f"""trap 'echo "$((LINENO - 1)) $BASH_COMMAND" >{failed}' ERR\n"""
        )
        commands = first_line + longer_waits(self.own(block.body))
        shell = ["bash", "-euo", "pipefail", "-c", commands]
        with printed.open("w") as out:
            process = subprocess.Popen(
                shell,
                cwd=self.copy,
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._started.append(process)
        minutes = MINUTES[block.mark]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(minutes * 60)
        line, _, command = failed.read_text().rstrip().partition(" ")
        output = printed.read_text(errors="replace")
        if process.returncode is None:
            self.fail(block.place(), f"did not end in {minutes} minutes", block, output)
        if process.returncode and block.mark != "fails":
            what = f"`{command}` ended with status {process.returncode}, expected 0"
            self.fail(block.place(int(line)), what, block, output)
        if not process.returncode and block.mark == "fails":
            self.fail(block.place(), "had to fail and ended with status 0", block, output)
        return output

    def compare(self, block, command, output):
        """Fail unless `output` has each line of a text block, in order; … stands for anything."""
        lines = iter(output.splitlines())
        for number, line in enumerate(self.own(block.body).splitlines(), start=1):
            pattern = re.compile(".*".join(map(re.escape, line.split("…"))))
            if not any(pattern.fullmatch(shown.rstrip()) for shown in lines):
                what = f"the text shows a line that its command did not print here: {line}"
                self.fail(block.place(number), what, command, output)

    def fail(self, place, what, block, output):
        body = self.own(block.body)
        message = f"{place}: {what}\n\ncommand ({block.place()}):\n{body}\nprinted:\n{output}"
        pytest.fail(message, pytrace=False)

    def stop(self):
        """Begin no other command, and end what the unit's commands left running."""
        self._stopped = True
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# A swarm of its own

# In the place of `docker`: all but builds is for the node, which gets what was built.
DOCKER = """#!/bin/bash
set -o pipefail
node() {{
    {docker} exec -i -e GHCR_OWNER -e IMAGE_TAG -e LAB25_PORT \\
        -w "/copy${{PWD#{copy}}}" {node} docker "$@"
}}
[[ $1 == build ]] || {{ node "$@"; exit; }}
{docker} "$@" || exit
for word; do
    if [[ $before == -t ]]; then {docker} save "$word" | node load --quiet >&2 || exit; fi
    before=$word
done
"""


def published(unit):
    """Return the tags that a unit deploys and does not build."""
    commands = "".join(block.body for block in unit.blocks if block.is_run)
    deployed = set(re.findall(r"IMAGE_TAG=([\w.-]+)", commands)) or {"dev"}
    return deployed - set(re.findall(r"-t \S+:([\w.-]+)", commands))


@contextlib.contextmanager
def own_swarm(unit, made):
    """Let `docker` mean an engine of its own, which is in no swarm yet; builds are made outside.

    What the unit deploys and does not build is in its registry, with the tag as its version.
    """
    registry, network = made.registry, f"{made.name}-network"
    for tag in published(unit):
        publish(made, tag)
    made.words["ghcr.io"] = "registry:5000"
    lacks = kernel_lacks(BASE)
    stack = made.copy / STACK_FILE.relative_to(REPOSITORY)
    stack.write_text(adapted(made.own(STACK_FILE.read_text()), lacks))
    options = ["--hostname", platform.node(), "--volume", f"{made.copy}:/copy:ro"]
    if "IPVS" not in lacks:
        options += ["--publish", f"127.0.0.1:{made.port}:{made.port}"]
    with contextlib.ExitStack() as cleanup:
        (node,) = cleanup.enter_context(engines(1, network, registry, *options))
        give_image(REDIS, node, made.folder)
        if "IPVS" in lacks:
            cleanup.enter_context(mesh(node, made.port))
        command = made.folder / "bin" / "docker"
        command.parent.mkdir()
        names = {"docker": shutil.which("docker"), "node": node.name, "copy": made.copy}
        command.write_text(DOCKER.format(**names))
        command.chmod(0o755)
        made.environment["PATH"] = f"{command.parent}:{os.environ['PATH']}"
        yield


def publish(made, tag):
    """Push a build of the reader's copy to the registry, and keep no image of it here."""
    name = f"{made.registry.address}/{made.registry.user}/{made.name}-web:{tag}"
    context = made.copy / CONTEXT.relative_to(REPOSITORY)
    docker("build", "--tag", name, "--build-arg", f"BUILD_VERSION={tag}", context)
    docker("push", name, env=made.registry.logged_in)
    docker("image", "rm", name)


# Side by side


def follow(unit, made):
    """Let a Reader do what a unit says; fail at the first place where the text is wrong."""
    if unit.in_own_swarm:
        made.words.pop("lab25_")  # in an engine of their own, services and keys keep their names
    made.copy_repository()
    with own_swarm(unit, made) if unit.in_own_swarm else contextlib.nullcontext():
        made.read(unit.blocks)


class Readers:
    """Readers of some units, several at a time; what became of each is its `result`.

    The one with the most to do begins, so that the others need not wait for it in the end.
    """

    def __init__(self, units, *options):
        self.units = sorted(units, key=lambda unit: len(unit.blocks), reverse=True)
        self.options = options
        self._made = []
        self._futures = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(UNITS_AT_ONCE)

    def begin(self):
        for unit in self.units:
            self._futures[unit.name] = self._pool.submit(self._follow, unit)

    def result(self, unit):
        """Wait for a unit's end; fail as its reader did."""
        if not self._futures:
            self.begin()
        self._futures[unit.name].result()

    def _follow(self, unit):
        made = Reader(*self.options)
        self._made.append(made)
        try:
            follow(unit, made)
        finally:
            made.stop()
            remove_all(made.name)

    def stop(self):
        """End those that are still at work; each removes what it has made."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for made in self._made:
            made.stop()
        self._pool.shutdown()
