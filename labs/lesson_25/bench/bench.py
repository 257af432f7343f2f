"""Measures the image and its stack against a single-stage image; prints what its README shows.

Exits with 1 where a limit is missed, with 2 where something could not be measured. Both images run
in the local Compose file at the same time, each with a Redis of its own. What is made here is
removed at the end; the images that the engine had to pull and its build cache stay.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

from harness import clients, engine, limits
from harness.clients import NO_ANSWER_SECONDS, every_hit_counts, probe, seconds_to, timed
from harness.engine import docker
from harness.registry import private_registry

PROBES, MISSED = 24, "**missed:"
# Figures and limits are in seconds and bytes, and shown in the row's unit; `bar` is the row's name
# in the chart.
UNITS = {"MB": 1e6, "kB": 1e3, "MiB": 2**20, "s": 1, "ms": 1e-3, "/s": 1, f"of {PROBES}": 1}
Row = collections.namedtuple("Row", "key what unit under ratio bar", defaults=[None] * 3)
ROWS = [
    Row(
        "layers",
        "layers over the base image, unpacked",
        "MB",
        limits.LAYERS_OVER_BASE_BYTES,
        limits.LAYERS_OVER_BASE_RATIO,
        "layers over the base",
    ),
    Row(
        "pull",
        "whole image to pull, compressed",
        "MB",
        limits.WHOLE_IMAGE_BYTES,
        limits.WHOLE_IMAGE_RATIO,
        "image to pull",
    ),
    Row(
        "rebuild", "rebuild after a change of `app.py`", "s", limits.REBUILD_SECONDS, bar="rebuild"
    ),
    Row("push", "pushed again after it", "kB", limits.PUSHED_AGAIN_BYTES, bar="pushed again"),
    Row("up", "`up -d --wait`, images present", "s", limits.UP_SECONDS, bar="up"),
    Row("stop", "`docker stop`, idle", "s", limits.STOP_SECONDS, bar="stop"),
    Row(
        "rate",
        "`GET /`, 16 connections",
        "/s",
        ratio=limits.THROUGHPUT_RATIO,
        bar="time of a GET /",
    ),
    Row("rate_p99", "99th percentile of it", "ms", bar="99th percentile"),
    Row(
        "direct",
        "`GET /` at the container's own address",
        "/s",
        None,
        limits.THROUGHPUT_DIRECT_RATIO,
        "own address",
    ),
    Row("uncounted", "the same with the counter off", "/s", bar="counter off"),
    Row(
        "calm_p99",
        "99th percentile at 200 requests a second",
        "ms",
        ratio=limits.P99_RATIO,
        bar="99th at 200/s",
    ),
    Row(
        "memory",
        "memory of the web container, idle",
        "MiB",
        limits.IDLE_MEMORY_BYTES,
        bar="memory, idle",
    ),
    Row(
        "memory_after",
        "the same after the load",
        "MiB",
        limits.IDLE_MEMORY_BYTES,
        bar="memory, later",
    ),
    Row(
        "slow",
        "`/health` while 200 slow clients hold connections open",
        "s",
        limits.AT_ONCE_SECONDS,
    ),
    Row(
        "late",
        "`/health` alone, Redis frozen: answers after more than 0.1 s",
        f"of {PROBES}",
        limits.WORKERS + 1,
    ),
    Row("alone", "the slowest of them", "s", limits.FIRST_WAIT_SECONDS),
    Row(
        "beside",
        "`/health` with Redis frozen and 64 clients on `/`",
        "s",
        limits.FIRST_WAIT_SECONDS,
    ),
    Row(
        "held_back",
        "`/health` with writes held back (`CLIENT PAUSE`) and 64 clients on `/`",
        "s",
        limits.FIRST_WAIT_SECONDS,
    ),
    Row("stopped_first", "`/` with Redis stopped, the first answer", "s"),
    Row("stopped", "`/` with Redis stopped, slowest of the next ten", "s", limits.AT_ONCE_SECONDS),
    Row("failover", "every hit counted again after Redis moved", "s", limits.BACK_WITHIN_SECONDS),
]


def at_full_speed(address, seconds):
    """Return how many requests were answered, how many a second, and their 99th percentile."""
    command = ["wrk", "-t1", "-c16", f"-d{seconds}", "--latency", f"http://{address}/"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "Non-2xx" not in output, output
    form = r"^ +99% +([\d.]+)(us|ms|s)$.*^ +(\d+) requests in.*^Requests/sec: +([\d.]+)"
    p99, unit, answered, rate = re.search(form, output, re.MULTILINE | re.DOTALL).groups()
    return int(answered), float(rate), float(p99) * {"us": 1e-6, "ms": 1e-3, "s": 1}[unit]


class Side:
    """One of the two that are compared: its image, its stack, and its figures by row."""

    def __init__(self, name, dockerfile, folder, override=""):
        self.name, self.dockerfile, self.folder, self.tag = (
            name,
            dockerfile,
            folder,
            name.replace(" ", "-"),
        )
        self.image, self.figures = f"{engine.RUN}:{self.tag}", collections.defaultdict(list)
        self.stack = engine.Stack(
            folder, engine.LOCAL_FILE, web=f"    image: {self.image}\n{override}"
        )
        self.port = self.stack.port

    def note(self, **figures):
        for key, figure in figures.items():
            self.figures[key].append(figure)

    # The steps: each notes figures, and fails where it cannot

    def image_and_change(self, registry, times):
        engine.build(self.tag, "--file", self.dockerfile)
        registry.push(self.image, "bench", "built")
        there = registry.blobs("bench", "built")
        context = shutil.copytree(engine.CONTEXT, self.folder / self.tag)
        for number in range(times):
            with (context / "app.py").open("a") as app:
                app.write(f"# {engine.RUN} {number}\n")
            changed = f"{self.tag}-changed", "--file", self.dockerfile
            self.note(rebuild=timed(engine.build, *changed, context=context))
        registry.push(f"{self.image}-changed", "bench", "changed")
        pushed = sum(
            size
            for digest, size in registry.blobs("bench", "changed").items()
            if digest not in there
        )
        self.note(layers=engine.bytes_over_base(self.image), pull=sum(there.values()), push=pushed)

    def start_and_stop(self, times):
        for _ in range(times):
            self.stack.down("--volumes")
            self.note(up=timed(self.stack.up))
        self.web, self.redis = map(self.stack.container, ("web", "redis"))
        self.note(memory=self.web.memory_bytes())
        for _ in range(times):
            self.note(stop=timed(docker, "stop", self.web.name))
            docker("start", self.web.name)
            self.stack.hits()
        at_full_speed(f"127.0.0.1:{self.port}", 1)  # a warm-up

    def load(self, seconds):
        published, own = f"127.0.0.1:{self.port}", f"{self.web.address(self.stack.network)}:8080"
        for key, address in ("rate", published), ("direct", own):
            before = self.stack.hits()
            answered, rate, p99 = at_full_speed(address, seconds)
            assert self.stack.hits() - before > answered, "not every answer was a counted hit"
            self.note(**{key: rate, f"{key}_p99": p99})
        with engine.container(self.image) as uncounted:
            self.note(uncounted=at_full_speed(f"{uncounted.address()}:8080", seconds)[1])
        command = ["hey", "-z", f"{seconds}s", "-c", "10", "-q", "20", f"http://{published}/"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        ((status, answered),) = re.findall(r"\[(\d+)]\s+(\d+) responses", output)
        assert status == "200" and int(answered) > 0.9 * 200 * seconds, (
            f"200 a second were not held:\n{output}"
        )
        self.note(calm_p99=float(re.search(r"99% in ([\d.]+) secs", output)[1]))

    def slow_clients(self):
        self.note(memory_after=self.web.memory_bytes())
        with clients.slow_clients(self.port):
            self.note(slow=max(probe(self.port, 6, every=0.5)))

    def frozen_redis(self, visitors):
        with clients.Visitors(self.port, visitors), self.redis.frozen():
            waits = probe(self.port, PROBES, every=0.25)
        self.stack.hits()
        if visitors:
            self.note(beside=max(waits))
        else:
            self.note(alone=max(waits), late=sum(wait > limits.AT_ONCE_SECONDS for wait in waits))

    def writes_held_back(self):
        with clients.Visitors(self.port, 64):
            self.redis.run("redis-cli", "client", "pause", "5000", "write")
            self.note(held_back=max(probe(self.port, PROBES, every=0.25)))
            self.redis.run("redis-cli", "client", "unpause")
        self.stack.hits()

    def stopped_redis(self):
        docker("stop", self.redis.name)
        # So many that every worker meets the outage.
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self.note(stopped_first=max(pool.map(seconds_to, [self.port] * 16)))
        self.note(stopped=max(seconds_to(self.port) for _ in range(10)))
        docker("start", self.redis.name)
        self.stack.hits()

    def redis_moved(self):
        with self.stack.redis_moved():
            try:
                again = timed(
                    clients.eventually,
                    lambda: every_hit_counts(self.port),
                    NO_ANSWER_SECONDS,
                    every=0,
                )
            except AssertionError:
                again = math.inf
        self.note(failover=again)


# --- What is printed


def digits(number):
    """Return a number with three significant digits and at most three decimals."""
    return f"{number:.{min(3, max(0, 2 - math.floor(math.log10(number or 1))))}f}"


def shown(unit, figures):
    """Return the median of the figures with its unit, then their spread where there are several."""
    if math.inf in figures:
        return f"not in {NO_ANSWER_SECONDS} s"
    form = "{:.0f}".format if unit.startswith("of") else digits
    low, median, high = (form(of(figures) / UNITS[unit]) for of in (min, statistics.median, max))
    return f"{median}{'' if unit == '/s' else ' '}{unit}" + (
        f" ({low}-{high})" if len(figures) > 1 else ""
    )


def table(lesson, single):
    """Return the table and the chart in Markdown."""
    bars = {}
    lines = ["| what | this lesson | single stage | ratio |", "| --- | --- | --- | --- |"]
    for row in ROWS:
        both = [side.figures[row.key] for side in (lesson, single)]
        ours, theirs = map(statistics.median, both)
        ratio = ours / theirs if theirs and max(ours, theirs) < math.inf else 0
        more = row.unit == "/s"  # is better
        missed = (
            [f"under {row.under / UNITS[row.unit]:.3g} {row.unit}"]
            if row.under and ours >= row.under
            else []
        )
        if row.ratio and (ratio >= row.ratio) != more:
            missed.append(f"ratio {'at least' if more else 'under'} {row.ratio:.3g}")
        if row.bar:
            bars[row.bar] = 100 / ratio if more else 100 * ratio
        what = f"{row.what} {MISSED} {', '.join(missed)}**" if missed else row.what
        cells = [
            what,
            *(shown(row.unit, figures) for figures in both),
            digits(ratio) if ratio else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "```mermaid",
        '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#2f81f7"}}}}%%',
    ]
    lines += ["xychart-beta horizontal", f"    x-axis {[*bars]}".replace("'", '"')]
    lines.append(
        f'    y-axis "percent of the single stage" 0 --> {50 * math.ceil(max(bars.values()) / 50)}'
    )
    lines += [f"    bar [{', '.join(map(digits, bars.values()))}]", "```"]
    return "\n".join(lines)


def conditions(lesson):
    """Return when, where and with what the figures were taken."""
    program = (
        "import importlib.metadata as m;"
        "print(*(f'{p} {m.version(p)}' for p in ('granian', 'flask')), sep=', ')"
    )
    parts = [
        f"{time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores",
        "Docker Engine " + docker("version", "--format", "{{.Server.Version}}").stdout,
        "Compose " + docker("compose", "version", "--short").stdout,
        lesson.web.run("python", "--version").stdout,
        lesson.web.python(program),
        "Redis "
        + lesson.redis.run("redis-server", "--version").stdout.split()[2].removeprefix("v="),
    ]
    made_with = ", ".join(part.strip() for part in parts)
    return (
        f"{made_with}. Medians (lowest-highest)."
        " Ratio: this lesson's figure divided by the single stage's."
    )


def measure(rounds, seconds):
    """Return what is to be printed; say on standard error how far it is."""
    with contextlib.ExitStack() as cleanup:
        folder = pathlib.Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        cleanup.callback(engine.remove_images)
        registry = cleanup.enter_context(private_registry(folder))
        lesson = Side("this lesson", engine.CONTEXT / "Dockerfile", folder)
        # The development server starts a thread for each connection: 200 slow clients need more
        # than the stack allows.
        dockerfile = pathlib.Path(__file__).with_name("Dockerfile.single-stage")
        single = Side("single stage", dockerfile, folder, "    pids_limit: !reset null\n")
        often = (
            (lesson, rounds),
            (single, 1),
        )  # once where the single stage takes up to half a minute
        steps = [(Side.image_and_change, side, registry, times) for side, times in often]
        steps += [(Side.start_and_stop, side, times) for side, times in often]
        steps += [(Side.load, side, seconds) for _ in range(rounds) for side in (lesson, single)]
        for side, _ in often:
            cleanup.callback(side.stack.down, "--volumes")
            steps += [
                (Side.slow_clients, side),
                (Side.frozen_redis, side, 0),
                (Side.frozen_redis, side, 64),
                (Side.writes_held_back, side),
            ]
            steps += [(Side.stopped_redis, side), (Side.redis_moved, side)]
        for number, (step, side, *values) in enumerate(steps, 1):
            print(
                f"bench: {number} of {len(steps)}, {side.name}: {step.__name__.replace('_', ' ')}",
                file=sys.stderr,
            )
            step(side, *values)
        return f"{conditions(lesson)}\n\n{table(lesson, single)}"


def main():
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often what varies is measured (default 5)"
    )
    parser.add_argument(
        "--seconds", type=int, default=5, help="how long a round of load lasts (default 5)"
    )
    options = parser.parse_args()
    missing = [
        f"{name} is missing: apt-get install {name}"
        for name in ("wrk", "hey")
        if not shutil.which(name)
    ]
    if problem := "\n".join(missing) or engine.problem():
        parser.exit(2, f"bench: {problem}\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it cleans up, as after Ctrl-C
    try:
        text = measure(options.rounds, options.seconds)
    except (AssertionError, OSError, subprocess.SubprocessError) as failure:
        parser.exit(2, f"bench: {failure}\n")
    print(text)
    return 1 if MISSED in text else 0


if __name__ == "__main__":
    sys.exit(main())
