"""Measures the lesson's image and stack against a single-stage image, and prints the figures as one Markdown table.

Exits with 1 where a limit is missed, with 2 where something could not be measured. Both images run in the lesson's
Compose file at the same time, each with a Redis of its own. Everything made here is removed at the end, but for what
the engine keeps in its build cache.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import http.client
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

LESSON = pathlib.Path(__file__).resolve().parents[1]
CONTEXT = LESSON / "app"
COMPOSE_FILE = LESSON / "compose" / "docker-compose.yml"
REDIS, REGISTRY = "redis:7-alpine", "registry:2"
RUN = f"lab25-bench-{secrets.token_hex(4)}"
NO_ANSWER_SECONDS = 20

# --- The limits: for the lesson's figure in the row's unit, and for its ratio to the single stage's

Row = collections.namedtuple("Row", "what key unit below ratio_below ratio_from", defaults=[None, None, None])
ROWS = [
    Row("layers over the base image, unpacked", "unpacked", "MB", below=36, ratio_below=1 / 10),
    Row("whole image to pull, compressed", "pull", "MB", below=56, ratio_below=1 / 3),
    Row("rebuild after a change of `app.py`", "rebuild", "s", below=1),
    Row("pushed again after it", "push", "kB", below=50),
    Row("`up -d --wait`, images present", "up", "s", below=4),
    Row("`docker stop`, idle", "stop", "s", below=1),
    Row("`GET /`, 16 connections", "rate", "/s", ratio_from=4),
    Row("99th percentile of it", "full_p99", "ms"),
    Row("99th percentile at 200 requests a second", "fixed_p99", "ms", ratio_below=1),
    Row("`/health` while 200 slow clients hold connections open", "slow", "s", below=1),
    Row("memory of the web container, idle", "memory", "MiB", below=80),
    Row("`/` with Redis stopped, the first answer", "stopped_first", "s"),
    Row("`/` with Redis stopped, slowest of the next ten", "stopped", "s", below=0.1),
    Row("`/health` with Redis frozen and 64 clients on `/`", "frozen", "s", below=1.5),
]
SCALE = {"MB": 1e6, "kB": 1e3, "ms": 1e-3}

# --- Programs


class Failure(Exception):
    """Something could not be measured; the text tells what."""


def say(step):
    print(f"bench: {step}", file=sys.stderr, flush=True)


def start(*command, **options):
    """Return the Popen of a program that the terminal's Ctrl-C does not reach; whoever starts it ends it."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, command)], text=True, start_new_session=True, **pipes, **options)


def run(*command, check=True, **options):
    """Return what a program prints. With `check`, raises Failure where it fails."""
    process = start(*command, **options)
    try:
        output, errors = process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # the group, because compose and buildx are children of docker
        process.communicate()
        raise
    if check and process.returncode:
        raise Failure(f"`{' '.join(map(str, command))}` failed:\n{(errors or output).strip()}")
    return output


def docker(*arguments, **options):
    """Return what the docker command prints. With `check`, raises Failure where it fails."""
    return run("docker", *arguments, **options)


def missing():
    """Return a line for each program that is not there, with the way to get it."""
    lines = [f"{name} is missing: apt-get install {name}" for name in ("wrk", "hey") if not shutil.which(name)]
    if not shutil.which("docker"):
        return [*lines, "docker is missing: https://docs.docker.com/engine/install"]
    for plugin in "compose", "buildx":
        if not docker(plugin, "version", check=False):
            lines.append(f"docker {plugin} is missing: https://docs.docker.com/engine/install")
    if not docker("version", "--format", "{{.Server.Version}}", check=False).strip():
        lines.append("no Docker Engine answers: see what `docker info` says")
    return lines


# --- The two that are compared


class Side:
    """An image and its stack, under names and a port of this run's own, with the figures taken of them by key."""

    def __init__(self, name, dockerfile, folder, override=""):
        self.name, self.dockerfile = name, dockerfile
        self.project = f"{RUN}-{name.replace(' ', '-')}"
        self.image = f"{self.project}:built"
        self.web, self.redis = f"{self.project}-web-1", f"{self.project}-redis-1"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.override = folder / f"{self.project}.yml"
        self.override.write_text(
            "services:\n  redis:\n    container_name: !reset null\n"
            f"  web:\n    container_name: !reset null\n    image: {self.image}\n{override}"
        )
        self.figures = collections.defaultdict(list)

    def note(self, key, figure):
        self.figures[key].append(figure)

    def build(self, context, tag):
        docker("build", "--quiet", "--file", self.dockerfile, "--tag", f"{self.project}:{tag}", context)

    def compose(self, *arguments, **options):
        files = ["--file", COMPOSE_FILE, "--file", self.override]
        environment = {**os.environ, "LAB25_PORT": str(self.port)}
        docker("compose", "--project-name", self.project, *files, *arguments, env=environment, **options)

    def down(self, **options):
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "0", **options)


def timed(function, *arguments):
    """Return the seconds that a call takes."""
    began = time.monotonic()
    function(*arguments)
    return time.monotonic() - began


def get(port, path, **headers):
    """Return the JSON of a 200. Raises Failure for another status, OSError or HTTPException where no answer comes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=NO_ANSWER_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
    if response.status != 200:
        raise Failure(f"GET {path} was answered with {response.status}: {body[:200]!r}")
    return json.loads(body)


def seconds_to(port, path):
    """Return the seconds to an answer, infinity where none came in NO_ANSWER_SECONDS."""
    try:
        return timed(get, port, path)
    except (OSError, http.client.HTTPException):
        return math.inf


def counted(port):
    """Return the number of a new hit, after a wait for what is still starting. Raises Failure where none comes."""
    for _ in range(100):
        with contextlib.suppress(OSError, http.client.HTTPException):
            if hit_count := get(port, "/")["hit_count"]:
                return hit_count
        time.sleep(0.1)
    raise Failure("GET / counts no hits")


# --- The image


def measure_layers(*sides):
    """Note the unpacked bytes over the base image, which is what the histories of both begin with."""
    history = "history", "--no-trunc", "--human=false", "--format", "{{.CreatedBy}}\t{{.Size}}"
    histories = [docker(*history, side.image).splitlines()[::-1] for side in sides]
    base = list(itertools.takewhile(lambda lines: lines[0] == lines[1], zip(*histories, strict=False)))
    for side, lines in zip(sides, histories, strict=True):
        side.note("unpacked", sum(int(line.rpartition("\t")[2]) for line in lines[len(base) :]))


def push(port, image):
    """Push an image to the registry and return the compressed bytes of its layers and configuration by digest."""
    pushed = f"127.0.0.1:{port}/{image}"
    docker("tag", image, pushed)
    docker("push", "--quiet", pushed)
    name, _, tag = image.partition(":")
    kinds = ["oci.image.index.v1", "oci.image.manifest.v1", "docker.distribution.manifest.v2"]
    accept = ", ".join(f"application/vnd.{kind}+json" for kind in kinds)
    manifest = get(port, f"/v2/{name}/manifests/{tag}", Accept=accept)
    if "manifests" in manifest:  # an index of the image and the attestation of its build
        (digest,) = [one["digest"] for one in manifest["manifests"] if one["platform"]["os"] == "linux"]
        manifest = get(port, f"/v2/{name}/manifests/{digest}", Accept=accept)
    return {blob["digest"]: blob["size"] for blob in (manifest["config"], *manifest["layers"])}


def measure_change(side, registry_port, folder, times):
    """Note the bytes to pull, and after a change of app.py the seconds of a rebuild and the bytes to push again."""
    there = push(registry_port, side.image)
    side.note("pull", sum(there.values()))
    context = shutil.copytree(CONTEXT, folder / f"{side.project}-context")
    for number in range(times):
        with (context / "app.py").open("a") as app:
            app.write(f"# {RUN} {number}\n")
        side.note("rebuild", timed(side.build, context, f"change-{number}"))
    changed = push(registry_port, f"{side.project}:change-0")
    side.note("push", sum(size for digest, size in changed.items() if digest not in there))


# --- The stack


def measure_start_and_stop(side, times):
    """Note the seconds of up and of stop, and the memory in between; leave the service running."""
    for _ in range(times):
        side.down()
        side.note("up", timed(side.compose, "up", "--detach", "--wait"))
    measure_memory(side)
    for _ in range(times):
        side.note("stop", timed(docker, "stop", side.web))
        docker("start", side.web)
        counted(side.port)


def measure_memory(side):
    """Note the MiB that `docker stats` tells; the median of three, because a health check is a process for a moment."""
    used = [docker("stats", "--no-stream", "--format", "{{.MemUsage}}", side.web) for _ in range(3)]
    parts = [re.match(r"([\d.]+)([KMG])iB", text).groups() for text in used]
    side.note("memory", statistics.median(float(number) * 1024 ** "KMG".index(unit) / 1024 for number, unit in parts))


def measure_full_speed(side, seconds):
    """Note requests a second and their 99th percentile. Raises Failure where an answer was no counted hit."""
    before = counted(side.port)
    output = run("wrk", "--threads", 1, "--connections", 16, "--duration", f"{seconds}s", "--latency", side.address)
    if "Non-2xx" in output or counted(side.port) - before <= int(re.search(r"(\d+) requests in", output)[1]):
        raise Failure(f"not all answers at full speed were counted hits:\n{output}")
    side.note("rate", float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1]))
    p99, unit = re.search(r"^ +99% +([\d.]+)(us|ms|s)$", output, re.MULTILINE).groups()
    side.note("full_p99", float(p99) * {"us": 1e-6, "ms": 1e-3, "s": 1}[unit])


def measure_fixed_rate(side, seconds):
    """Note the 99th percentile at 200 requests a second, which come ten at a time."""
    output = run("hey", "-z", f"{seconds}s", "-c", 10, "-q", 20, "-o", "csv", side.address)
    answers = list(csv.DictReader(output.splitlines()))
    if {answer["status-code"] for answer in answers} != {"200"}:
        raise Failure("not all requests at the fixed rate were answered with 200")
    if len(answers) < 0.9 * 200 * seconds:
        say(f"{side.name}: only {len(answers)} answers in {seconds} s, so the rate was not held")
    times = sorted(float(answer["response-time"]) for answer in answers)
    side.note("fixed_p99", times[math.ceil(0.99 * len(times)) - 1])


def measure_slow_clients(side):
    """Note the slowest /health while 200 clients send a byte of their headers each half second."""
    waits = []
    with contextlib.ExitStack() as connections:
        clients = [socket.create_connection(("127.0.0.1", side.port), 5) for _ in range(200)]
        for client in clients:
            connections.enter_context(client)
            client.sendall(b"GET / HTTP/1.1\r\nHost: lab25\r\nX-Slow: ")
        while len(waits) < 6 and math.inf not in waits:
            time.sleep(0.5)
            for client in clients:
                with contextlib.suppress(OSError):  # a server may have lost patience with it
                    client.sendall(b".")
            waits.append(seconds_to(side.port, "/health"))
    side.note("slow", max(waits))


def measure_frozen_redis(side):
    """Note the slowest /health of five seconds with Redis frozen, asked every 0.1 s while 64 clients ask for /."""
    docker("pause", side.redis)
    load = start("wrk", "--threads", 1, "--connections", 64, "--duration", "60s", side.address)
    waits, end = [], time.monotonic() + 5
    try:
        while time.monotonic() < end:
            waits.append(seconds_to(side.port, "/health"))
            time.sleep(max(0, 0.1 - waits[-1]))
    finally:
        load.kill()
        load.communicate()
        docker("unpause", side.redis)
    side.note("frozen", max(waits))
    counted(side.port)


def measure_stopped_redis(side):
    """Note the seconds to the first answer with Redis stopped, and to the slowest of the next ten.

    The first are 16 at once: every worker has its first failure then, and all of them pause together.
    """
    docker("stop", side.redis)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        side.note("stopped_first", max(pool.map(seconds_to, [side.port] * 16, ["/"] * 16)))
    side.note("stopped", max(seconds_to(side.port, "/") for _ in range(10)))


# --- The table


def digits(number):
    """Return a number with three significant digits and at most three decimals."""
    return f"{number:.{min(3, max(0, 2 - math.floor(math.log10(number or 1))))}f}"


def cell(row, values):
    """Return the median with its unit, then the spread; memory has its figures before and after the load instead."""
    if math.inf in values:
        return f"no answer in {NO_ANSWER_SECONDS} s"
    unit = row.unit if row.unit.startswith("/") else f" {row.unit}"
    if row.key == "memory":
        return f"{digits(values[0])}{unit} ({digits(values[1])} after the load)"
    spread = f" ({digits(min(values))} to {digits(max(values))})" if len(values) > 1 else ""
    return digits(statistics.median(values)) + unit + spread


def report(lesson, single):
    """Print the table and return whether every limit is kept, by the memory after the load too."""
    print("| what | this lesson | single stage | ratio | limit |\n| --- | --- | --- | --- | --- |")
    all_kept = True
    for row in ROWS:
        both = [[figure / SCALE.get(row.unit, 1) for figure in side.figures[row.key]] for side in (lesson, single)]
        ours, theirs = map(max if row.key == "memory" else statistics.median, both)
        ratio = ours / theirs if math.isfinite(ours) else math.inf
        limits = {}
        if row.below:
            limits[f"under {row.below} {row.unit}"] = ours < row.below
        if row.ratio_below:
            limits[f"ratio under {row.ratio_below:.3g}"] = ratio < row.ratio_below
        if row.ratio_from:
            limits[f"ratio {row.ratio_from} or more"] = ratio >= row.ratio_from
        kept = all(limits.values())
        all_kept = all_kept and kept
        columns = [row.what, *(cell(row, figures) for figures in both), digits(ratio) if ratio < math.inf else ""]
        print(f"| {' | '.join(columns)} | {', '.join(limits)}{'' if kept else ' **missed**'} |")
    return all_kept


def conditions(lesson):
    """Return the line that tells when, where and with what the figures were taken."""
    packages = "import importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in ('granian', 'flask')), sep=', ')"
    parts = [
        f"{datetime.date.today()}: {os.cpu_count()} cores",
        f"Docker Engine {docker('version', '--format', '{{.Server.Version}}')}",
        f"Compose {docker('compose', 'version', '--short')}",
        docker("exec", lesson.web, "python", "--version"),
        docker("exec", lesson.web, "python", "-c", packages),
        f"Redis {docker('exec', lesson.redis, 'redis-server', '--version').partition('v=')[2].split()[0]}",
    ]
    return ", ".join(part.strip() for part in parts)


# --- The run


def measure(lesson, single, folder, rounds, seconds):
    """Note all figures and return the line on their conditions."""
    sides = lesson, single
    repeated = (lesson, rounds), (single, 1)  # once, where the single stage takes up to half a minute
    for side in sides:
        say(f"{side.name}: build")
        side.build(CONTEXT, "built")
    measure_layers(*sides)
    docker("run", "--detach", "--name", f"{RUN}-registry", "--publish", "127.0.0.1::5000", REGISTRY)
    registry_port = docker("port", f"{RUN}-registry", "5000").split()[0].rpartition(":")[2]
    for side, times in repeated:
        say(f"{side.name}: push, rebuild, push again")
        measure_change(side, int(registry_port), folder, times)
    for side, times in repeated:
        say(f"{side.name}: up and stop")
        measure_start_and_stop(side, times)
    for side in sides:
        run("wrk", "--connections", 16, "--duration", "1s", side.address)  # a warm-up
    for number, side in itertools.product(range(1, rounds + 1), sides):
        say(f"{side.name}: load, round {number} of {rounds}")
        measure_full_speed(side, seconds)
        measure_fixed_rate(side, seconds)
    line = conditions(lesson)
    for side in sides:
        measure_memory(side)
        say(f"{side.name}: slow clients, Redis frozen, Redis stopped")
        measure_slow_clients(side)
        measure_frozen_redis(side)
        measure_stopped_redis(side)
    return line


def clean_up(sides, pulled):
    """Remove everything that this run made, and the images that it had to pull."""
    say("cleaning up")
    for side in sides:
        side.down(check=False)
    docker("rm", "--force", "--volumes", f"{RUN}-registry", check=False)
    names = docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}", check=False).split()
    for name in [name for name in names if RUN in name] + pulled:
        docker("image", "rm", name, check=False)


def on_interrupt(action):
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, action)


def interrupted(number, _):
    on_interrupt(signal.SIG_IGN)  # nothing shall interrupt the cleaning up
    sys.exit(128 + number)


def main():
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often what varies is measured (default 5)")
    parser.add_argument("--seconds", type=int, default=5, help="how long a round of load lasts (default 5)")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds are 1 or more")
    on_interrupt(interrupted)
    if lines := missing():
        print("\n".join(lines), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder, pulled = pathlib.Path(name), []
        lesson = Side("this lesson", CONTEXT / "Dockerfile", folder)
        dockerfile = pathlib.Path(__file__).with_name("Dockerfile.single-stage")
        # The development server starts a thread for each connection: 200 slow clients need more than the stack allows.
        single = Side("single stage", dockerfile, folder, override="    pids_limit: !reset null\n")
        try:
            for image in REDIS, REGISTRY:
                if not docker("image", "ls", "--quiet", image):
                    pulled.append(image)
                    docker("pull", "--quiet", image)
            line = measure(lesson, single, folder, options.rounds, options.seconds)
        except (Failure, OSError, http.client.HTTPException) as failure:
            say(failure)
            return 2
        finally:
            on_interrupt(signal.SIG_IGN)
            clean_up([lesson, single], pulled)
    print(f"{line}. Ratio: this lesson's figure divided by the single stage's.\n")
    return 0 if report(lesson, single) else 1


if __name__ == "__main__":
    sys.exit(main())
