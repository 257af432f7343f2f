"""Compares the image with a single-stage image, both in the local Compose file.

Prints the table that is in README.md. Exits with 1 if a row misses its limit, and with 2 if
something cannot be measured. Removes everything that it created, except the engine's build cache.
"""

import argparse
import collections
import json
import math
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

from harness import engine, limits
from harness.clients import Visitors, counted, eventually, get
from harness.engine import docker
from harness.registry import private_registry

# The clients that create the load, since Python would be slower than the service.
LOAD = f"FROM {engine.BASE}\nRUN apt-get update && apt-get install -y wrk hey\n"
SINGLE_STAGE = pathlib.Path(__file__).with_name("Dockerfile.single-stage")
NO_ANSWER_SECONDS = 20
MISSED = "missed:"

# Figures and limits are in bytes and seconds. They are printed in the unit of the row.
UNITS = {"MB": 1e6, "MiB": 2**20, "s": 1, "ms": 1e-3, "/s": 1}
Row = collections.namedtuple("Row", "what unit limit ratio", defaults=[None, None])
ROWS = {
    "layers": Row(
        "layers over the base image, unpacked",
        "MB",
        limits.LAYERS_OVER_BASE_BYTES,
        limits.LAYERS_OVER_BASE_RATIO,
    ),
    "pull": Row("whole image to pull, compressed", "MB", limits.WHOLE_IMAGE_BYTES),
    "rebuild": Row("rebuild after a change to `app.py`", "s", limits.REBUILD_SECONDS),
    "up": Row("`docker compose up --wait`, images present", "s", limits.UP_SECONDS),
    "stop": Row("`docker stop`, without `init`", "s", limits.STOP_SECONDS),
    "rate": Row("`GET /` with 16 connections", "/s", ratio=limits.THROUGHPUT_RATIO),
    "p99": Row("99th percentile at 200 requests a second", "ms", ratio=limits.P99_RATIO),
    "memory": Row("memory of web, idle", "MiB", limits.IDLE_MEMORY_BYTES),
    "frozen": Row("slowest `/health` while Redis is frozen", "s", limits.FROZEN_SECONDS),
    "again": Row("counting again after Redis is back", "s", limits.BACK_WITHIN_SECONDS),
}


def timed(function, *arguments, **options):
    """Return the seconds that a call takes."""
    started = time.monotonic()
    function(*arguments, **options)
    return time.monotonic() - started


def load(*command):
    """Return the output of wrk or hey, which can reach the ports published on this machine."""
    return docker("run", "--rm", "--network=host", f"{engine.RUN}:load", *command).stdout


class Side:
    """One of the two images: its stack, and its figures by row."""

    def __init__(self, name, dockerfile, folder):
        self.name = name
        self.dockerfile = dockerfile
        self.folder = folder
        self.tag = name.replace(" ", "-")
        self.image = f"{engine.RUN}:{self.tag}"
        # Names in this file override the engine's name server.
        self.hosts = folder / f"{self.tag}.hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        web = f"    image: {self.image}\n    volumes: ['{self.hosts}:/etc/hosts:ro']\n"
        self.stack = engine.Stack(folder, engine.LOCAL_FILE, web=web)
        self.url = f"http://127.0.0.1:{self.stack.port}/"
        self.figures = collections.defaultdict(list)

    def note(self, row, figure):
        self.figures[row].append(figure)

    def note_slowest(self, row, seconds):
        self.figures[row] = [max([seconds, *self.figures[row]])]

    # The steps. Each records its figures, and fails if it cannot measure them.

    def build(self, registry, times):
        # Without provenance, the tag points to one manifest instead of an index.
        options = ["--file", self.dockerfile, "--provenance=false"]
        engine.build(self.tag, *options)
        self.note("layers", sum(engine.layer_sizes(self.image)[: -engine.base_lines()]))
        name = registry.name("bench", self.tag)
        registry.push(self.image, name)
        inspect = ["buildx", "imagetools", "inspect", "--raw", name]
        manifest = json.loads(docker(*inspect, env=registry.logged_in).stdout)
        blobs = [manifest["config"], *manifest["layers"]]
        self.note("pull", sum(blob["size"] for blob in blobs))
        context = shutil.copytree(engine.CONTEXT, self.folder / self.tag)
        for number in range(times):
            with (context / "app.py").open("a") as app:
                app.write(f"# {engine.RUN} {number}\n")
            changed = f"{self.tag}-changed"
            self.note("rebuild", timed(engine.build, changed, *options, context=context))

    def start_and_stop(self, times):
        for _ in range(times):
            self.stack.down("--volumes")
            self.note("up", timed(self.stack.up))
        self.note("memory", self.stack.container("web").memory_bytes())
        for _ in range(times):
            # Outside the stack, whose `init: true` passes signals on for every image.
            with engine.container(self.image) as web:
                self.note("stop", timed(docker, "stop", web.name))

    def load(self, seconds):
        before = self.stack.hits()
        output = load("wrk", "-t1", "-c16", f"-d{seconds}", self.url)
        answered = int(re.search(r"(\d+) requests in", output)[1])
        assert self.stack.hits() - before > answered, f"not every answer is a hit:\n{output}"
        self.note("rate", float(re.search(r"Requests/sec: +([\d.]+)", output)[1]))

        output = load("hey", "-z", f"{seconds}s", "-c", "10", "-q", "20", self.url)
        answered = int(re.search(r"\[200]\s+(\d+) responses", output)[1])
        assert answered > 0.9 * 200 * seconds, f"less than 200 requests a second:\n{output}"
        self.note("p99", float(re.search(r"99% in ([\d.]+) secs", output)[1]))

    def frozen_redis(self, visitors):
        redis = self.stack.container("redis").name
        with Visitors(self.stack.port, visitors):
            docker("pause", redis)
            for _ in range(24):
                wait = timed(get, self.stack.port, "/health", timeout=NO_ANSWER_SECONDS)
                self.note_slowest("frozen", wait)
                time.sleep(max(0, 0.25 - wait))
            docker("unpause", redis)
        self.wait_until_all_hits_count()

    def moved_redis(self):
        """Move the name of Redis. The first becomes a replica, which keeps its connections."""
        first = self.stack.container("redis")
        with engine.redis_in(f"{self.stack.project}_backend") as second:
            address = second.address(f"{self.stack.project}_backend")
            first.run("redis-cli", "replicaof", address, "6379")
            self.hosts.write_text(f"127.0.0.1 localhost\n{address} redis\n")
            self.wait_until_all_hits_count()

    def wait_until_all_hits_count(self):
        def all_workers_count():
            return all(counted(get(self.stack.port)) for _ in range(20))

        self.note_slowest("again", timed(eventually, all_workers_count, NO_ANSWER_SECONDS, every=0))


def digits(number):
    """Return a number with about three significant digits."""
    decimals = 2 - math.floor(math.log10(number)) if number else 0
    return f"{number:,.{min(2, max(0, decimals))}f}"


def cell(row, figures):
    """Return the median of a row with its unit, then the lowest and highest of several figures."""
    if not figures:
        return ""
    low, median, high = (
        digits(of(figures) / UNITS[row.unit]) for of in (min, statistics.median, max)
    )
    spread = f" ({low}-{high})" if len(figures) > 1 else ""
    return f"{median} {row.unit}{spread}".replace(" /s", "/s")


def table(ours, theirs):
    """Return the table in Markdown, in which each row that misses its limit is marked."""
    lines = ["| | this lesson | single stage | ratio |", "| --- | --- | --- | --- |"]
    for key, row in ROWS.items():
        figures = [side.figures[key] for side in (ours, theirs)]
        median = statistics.median(figures[0])
        missed, ratio = [], ""
        if row.limit and median >= row.limit:
            missed.append(f"under {digits(row.limit / UNITS[row.unit])} {row.unit}")
        if figures[1]:
            ratio = median / statistics.median(figures[1])
            if row.ratio and (ratio < row.ratio if row.unit == "/s" else ratio > row.ratio):
                missed.append(f"ratio {digits(row.ratio)}")
            ratio = digits(ratio)
        what = f"{row.what} **{MISSED} {', '.join(missed)}**" if missed else row.what
        lines.append(f"| {what} | {cell(row, figures[0])} | {cell(row, figures[1])} | {ratio} |")
    return "\n".join(lines)


def measure(rounds, seconds):
    """Return the table. Log each step to standard error."""
    with ExitStack() as cleanup:
        folder = pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        cleanup.callback(engine.remove_images)
        registry = cleanup.enter_context(private_registry(folder))
        ours = Side("this lesson", engine.CONTEXT / "Dockerfile", folder)
        theirs = Side("single stage", SINGLE_STAGE, folder)
        for side in (ours, theirs):
            cleanup.callback(side.stack.down, "--volumes")
        (folder / "load").mkdir()
        (folder / "load" / "Dockerfile").write_text(LOAD)
        # The single stage is measured once, because it takes up to 30 seconds to start.
        often = [(ours, max(rounds, 3)), (theirs, 1)]
        steps = [(Side.build, side, registry, times) for side, times in often]
        steps += [(Side.start_and_stop, side, times) for side, times in often]
        steps += [(Side.load, side, seconds) for _ in range(rounds) for side in (ours, theirs)]
        # The remaining rows depend on the app, which is the same in both images.
        steps += [(Side.frozen_redis, ours, visitors) for visitors in (0, 64)]
        steps += [(Side.moved_redis, ours)]
        print("bench: build the clients", file=sys.stderr)
        engine.build("load", context=folder / "load")
        for step, side, *values in steps:
            print(f"bench: {side.name}: {step.__name__.replace('_', ' ')}", file=sys.stderr)
            step(side, *values)
        return table(ours, theirs)


def main():
    """Print the machine and the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of load (default 5)")
    parser.add_argument("--seconds", type=int, default=5, help="seconds of a load (default 5)")
    options = parser.parse_args()
    if problem := engine.problem():
        parser.exit(2, f"bench: {problem}\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up, as after Ctrl-C
    machine = "{{.NCPU}} CPUs ({{.Architecture}}), {{.OperatingSystem}}"
    try:
        text = measure(options.rounds, options.seconds)
        print(time.strftime("%Y-%m-%d"), end=", ")
        print(docker("info", "--format", f"{machine}, Docker {{{{.ServerVersion}}}}").stdout)
    except (AssertionError, OSError, subprocess.SubprocessError) as failure:
        parser.exit(2, f"bench: {failure}\n")
    print(text)
    return 1 if MISSED in text else 0


if __name__ == "__main__":
    sys.exit(main())
