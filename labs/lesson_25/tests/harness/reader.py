"""Runs the commands of the texts in a copy of the repository, under names of this test run."""

import concurrent.futures
import contextlib
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys

import pytest

from harness import REPOSITORY, engine
from harness.engine import BASE, REDIS, RUN, build, free_port, give_image, remove_all
from harness.swarm import STACK_FILE, adapted, engines, kernel_lacks, mesh

PUBLISHED = ["1.2.3", "1.2.4"]  # tags in the registry of a unit with a swarm of its own
READERS = 3  # in parallel with the other tests, because they wait more than they work
UNIT_MINUTES = 15

# A unit is one shell. Each of its blocks is a file whose line numbers are those of the text. On a
# busy machine, it sleeps longer.
START = """\
set -euo pipefail
sleep() {{ command sleep "$(awk "BEGIN {{ print {slower} * $1 }}")"; }}
trap 'echo "$LINENO: exited with status $?: $BASH_COMMAND" >{problem}' ERR
trap '[ $? != 0 ] || rm {problem}' EXIT
"""
NEXT_BLOCK = 'echo; echo {marker}; echo "{line}: not finished" >{problem}\n'
BLOCK = "source {file}\n"
FAILING_BLOCK = """\
set +e; (set -e; source {file})
[ $? != 0 ] || {{ echo "{line}: must fail, but exited with status 0" >{problem}; exit 1; }}; set -e
"""

# Replaces `docker` in a unit with a swarm of its own: it builds here, and does the rest there.
DOCKER = """\
#!/bin/bash
set -euo pipefail
node() {{
    {docker} exec -i -e GHCR_OWNER -e IMAGE_TAG -w "/copy${{PWD#{copy}}}" {node} docker "$@"
}}
if [[ $1 != build ]]; then node "$@"; exit; fi
{docker} "$@"
{docker} save "$(sed 's/.* -t \\([^ ]*\\).*/\\1/' <<<"$*")" | node load --quiet >&2
"""


class Reader:
    """Runs one unit in a copy of the repository, where names, port and registry are its own."""

    def __init__(self, unit, folder, registry):
        self.unit = unit
        self.name = f"{RUN}-{secrets.token_hex(2)}"
        self.registry = registry
        self.port = free_port()
        self.folder = folder / self.name
        self.copy = self.folder / "copy"
        self.words = {
            "lab25-web": f"{self.name}-web",
            "lab25-redis": f"{self.name}-redis",
            "name: lab25\n": f"name: {self.name}\n",
            "127.0.0.1:8080": f"127.0.0.1:{self.port}",
            "LAB25_PORT:-8080": f"LAB25_PORT:-{self.port}",
            "8081": str(free_port()),
            "orders-api": f"{self.name}-api",
            "ORDERS_API": f"{self.name}-api".upper().replace("-", "_"),
            "ghcr.io": registry.address,
            "your-name": registry.user,
        }
        if not unit.in_own_swarm:  # an engine of its own has no other network or volume
            self.words["lab25_"] = f"{self.name}_"
        self.environment = {
            **registry.logged_out(),
            "GHCR_OWNER": registry.user,
            "GHCR_TOKEN": registry.password,
            "PORT": str(self.port),  # of the service without Docker
            # The variables that the lesson's reader sets in each new terminal.
            "LAB25_PORT": str(self.port),
            "WEB": f"http://127.0.0.1:{self.port}",
        }
        self._stopped = False
        self._shell = None

    def follow(self):
        """Run the unit and remove what it made. Fail at the first place where the text is wrong."""
        try:
            self.copy_repository()
            with own_swarm(self) if self.unit.in_own_swarm else contextlib.nullcontext():
                self.run()
        finally:
            self.stop()
            remove_all(self.name)

    def own(self, text):
        """Return a text with the names of this reader."""
        for word, own in self.words.items():
            text = text.replace(word, own)
        return text

    def copy_repository(self):
        """Copy what git tracks or would add, with the names of this reader."""
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for file in subprocess.check_output(listing, cwd=REPOSITORY, text=True).splitlines():
            source, target = REPOSITORY / file, self.copy / file
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
                target.write_text(self.own(target.read_text()))
        subprocess.run(["git", "init", "--quiet"], cwd=self.copy, check=True)
        subprocess.run(["git", "add", "."], cwd=self.copy, check=True)
        if not any("-m venv .venv" in block.body for block, _ in self.unit.commands()):
            (self.copy / ".venv").symlink_to(sys.prefix)

    def run(self):
        """Run all blocks in one shell, and compare what they print with what the text shows."""
        commands = self.unit.commands()
        names = {"marker": f"--- {self.name} ---", "problem": self.folder / "problem"}
        slower = max(1, os.getloadavg()[0] / os.cpu_count())
        script = START.format(**names, slower=slower)
        for block, _ in commands:
            file = self.folder / f"{block.line}.sh"
            file.write_text("\n" * block.line + self.own(block.body))
            form = NEXT_BLOCK + (FAILING_BLOCK if block.mark == "fails" else BLOCK)
            script += form.format(**names, file=file, line=block.line)
        outputs = self.print_of(script).split(f"\n{names['marker']}\n")[1:]
        for (block, shown), output in zip(commands, outputs, strict=False):
            if output is outputs[-1] and names["problem"].exists():
                self.fail(f"{block.text}:{names['problem'].read_text().rstrip()}", block, output)
            for text in shown:
                self.compare(text, block, output)

    def print_of(self, script):
        """Return what a script prints, even if it fails or does not finish in time."""
        assert not self._stopped, "the test run was stopped"
        printed = self.folder / "printed"
        with printed.open("w") as out:
            self._shell = subprocess.Popen(
                ["bash", "-c", script],
                cwd=self.copy,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._shell.wait(UNIT_MINUTES * 60)
        return printed.read_text(errors="replace")

    def compare(self, shown, block, output):
        """Fail unless the output has each line that is shown, in order. … stands for anything."""
        lines = iter(output.splitlines())
        for number, line in enumerate(self.own(shown.body).splitlines(), start=1):
            pattern = re.compile(".*".join(map(re.escape, line.split("…"))))
            if not any(pattern.fullmatch(printed.rstrip()) for printed in lines):
                self.fail(f"{shown.place(number)}: not printed: {line}", block, output)

    def fail(self, problem, block, output):
        commands = f"commands ({block.place()}):\n{self.own(block.body)}"
        pytest.fail(f"{problem}\n\n{commands}\nprinted:\n{output}", pytrace=False)

    def stop(self):
        """Kill what the unit started, and start nothing more."""
        self._stopped = True
        if self._shell:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._shell.pid, signal.SIGKILL)
            self._shell.wait()


@contextlib.contextmanager
def own_swarm(reader):
    """Let `docker` be an engine in a container in a `with` block. It is in no swarm yet."""
    repository = f"{reader.registry.address}/{reader.registry.user}/{reader.name}-web"
    for tag in PUBLISHED:
        # A name of its own, because two units that build one name at once get in each other's way.
        built = build(f"{reader.name}-{tag}", "--build-arg", f"BUILD_VERSION={tag}")
        reader.registry.push(built, f"{repository}:{tag}")
    reader.words["ghcr.io"] = "registry:5000"
    lacks = kernel_lacks(BASE)
    stack = reader.copy / STACK_FILE.relative_to(REPOSITORY)
    stack.write_text(adapted(reader.own(STACK_FILE.read_text()), lacks))
    options = ["--hostname", platform.node(), "--volume", f"{reader.copy}:/copy:ro"]
    if "IPVS" not in lacks:
        options += ["--publish", f"127.0.0.1:{reader.port}:{reader.port}"]
    with contextlib.ExitStack() as cleanup:
        network = f"{reader.name}-network"
        (node,) = cleanup.enter_context(engines(1, network, reader.registry, *options))
        give_image(REDIS, node, reader.folder)
        if "IPVS" in lacks:
            cleanup.enter_context(mesh(node, reader.port))
        command = reader.folder / "bin" / "docker"
        command.parent.mkdir()
        names = {"docker": shutil.which("docker"), "node": node.name, "copy": reader.copy}
        command.write_text(DOCKER.format(**names))
        command.chmod(0o755)
        reader.environment["PATH"] = f"{command.parent}:{os.environ['PATH']}"
        yield


@pytest.fixture(scope="session", autouse=True)
def followed(request, no_image_stays, tmp_path_factory):
    """A Future for each unit that this run selects, by name. Readers work while other tests run."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    units = [parameters["unit"] for parameters in selected if "unit" in parameters]
    if not units or engine.problem():
        yield None
        return
    units.sort(key=lambda unit: len(unit.blocks), reverse=True)  # the longest ones first
    folder, registry = tmp_path_factory.mktemp("texts"), request.getfixturevalue("registry")
    readers = [Reader(unit, folder, registry) for unit in units]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        futures = {reader.unit.name: pool.submit(reader.follow) for reader in readers}
        yield futures
        pool.shutdown(wait=False, cancel_futures=True)
        for reader in readers:
            reader.stop()
