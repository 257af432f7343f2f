"""The service while things around it go wrong, with clients asking meanwhile."""

import concurrent.futures
import contextlib
import itertools
import json
import time

import pytest

from clients import Visitors, eventually, every_hit_counts, get, probe
from engine import RUN, container, docker, kill, ping, redis_in
from limits import (
    AT_ONCE_SECONDS,
    BACK_WITHIN_SECONDS,
    FIRST_WAIT_SECONDS,
    MEMORY_GROWTH_RATIO,
    STOP_UNDER_LOAD_SECONDS,
    WORKERS,
)

pytestmark = pytest.mark.engine


def counts(ask):
    return ask().json["hit_count"] is not None


# Redis goes, and comes back


@pytest.mark.slow
def test_redis_going_ten_times_costs_no_answer_and_no_number(stack):
    """Stopped and started, killed, restarted: never a 5xx, no number twice, none answered and then lost."""
    web, redis = stack.container("web"), stack.container("redis")
    lines = len(web.log().splitlines())

    def stop_and_start():
        docker("stop", redis.name)
        time.sleep(1)
        docker("start", redis.name)

    def crash():
        kill(redis.name)

    def restart():
        docker("restart", redis.name)

    with Visitors(stack.port) as visitors:
        for fault in itertools.islice(itertools.cycle([stop_and_start, crash, restart]), 10):
            fault()
            eventually(lambda: ping(redis), 10)
            eventually(lambda: counts(stack.get), BACK_WITHIN_SECONDS)
    numbers = visitors.numbers()
    assert all(own == sorted(own) for own in numbers)
    everyone = list(itertools.chain(*numbers))
    assert len(everyone) == len(set(everyone)) > 100
    assert int(redis.run("redis-cli", "get", "lab25_hits").stdout) >= max(everyone)
    new = web.log().splitlines()[lines:]
    gone = [line for line in new if "Redis failed" in line]
    assert 10 <= len(gone) <= 20, "at most one for each fault and worker"
    assert len(new) <= 2 * len(gone)


@pytest.mark.slow
@pytest.mark.timing
def test_a_frozen_redis_holds_up_neither_health_nor_memory(stack):
    web, redis = stack.container("web"), stack.container("redis")
    with Visitors(stack.port, count=64):
        time.sleep(3)
    before = web.memory_bytes()
    with Visitors(stack.port, count=64) as visitors:
        time.sleep(1)
        with redis.frozen():  # long enough for the engine's own health check
            waits = probe(stack.port, times=200, every=0.06)
        eventually(lambda: counts(stack.get), BACK_WITHIN_SECONDS)
    assert max(waits) < FIRST_WAIT_SECONDS
    assert web.health == "healthy"
    assert web.inspect()["State"]["Health"]["FailingStreak"] == 0
    visitors.numbers()
    assert web.memory_bytes() < before * MEMORY_GROWTH_RATIO


@pytest.mark.timing
def test_each_worker_waits_once_where_only_health_is_asked_and_redis_is_frozen(stack):
    stack.hits()
    with stack.container("redis").frozen():
        waits = probe(stack.port, times=24, every=0.25)
    assert len([wait for wait in waits if wait > AT_ONCE_SECONDS]) <= WORKERS
    eventually(lambda: every_hit_counts(stack.port), 5)


def test_the_log_says_for_each_worker_that_redis_went_and_that_hits_are_counted_again(stack):
    web, redis = stack.container("web"), stack.container("redis")
    with Visitors(stack.port, count=16, pause=0.01):  # enough to meet both workers
        time.sleep(4)  # until both have got over what an earlier test did
        lines = len(web.log().splitlines())

        def told(words):
            return len([line for line in web.log().splitlines()[lines:] if words in line])

        with redis.frozen():
            eventually(lambda: told("Redis failed, hits are not counted: Timeout") == WORKERS, 10)
        eventually(lambda: told("Redis is back, hits are counted again") == WORKERS, 10)
    assert told("") == 2 * WORKERS


def test_hits_are_counted_where_redis_has_moved_while_the_old_one_lives_on_as_a_replica(stack):
    stack.hits()
    with stack.redis_moved():
        eventually(lambda: every_hit_counts(stack.port), BACK_WITHIN_SECONDS)
    eventually(lambda: every_hit_counts(stack.port), 5)


# Each cause is named, and passes


@pytest.mark.parametrize(
    ("fault", "cause", "cure"),
    [
        pytest.param("del lab25_hits; lpush lab25_hits 1", "WRONGTYPE", "del lab25_hits", id="wrong-type"),
        pytest.param("config set maxmemory 1", "maxmemory", "config set maxmemory 0", id="full-memory"),
        pytest.param("replicaof 192.0.2.1 6379", "read only replica", "replicaof no one", id="read-only-replica"),
    ],
)
def test_an_error_that_redis_answers_is_named_and_passes(stack, fault, cause, cure):
    redis = stack.container("redis")

    def tell(commands):
        for command in commands.split("; "):
            assert "ERR" not in redis.run("redis-cli", *command.split()).stdout

    stack.hits()
    tell(fault)
    try:
        answer = stack.get()
        assert (answer.status, answer.json["hit_count"]) == (200, None)
        assert cause in answer.json["redis_error"]
    finally:
        tell(cure)
    eventually(lambda: counts(stack.get), BACK_WITHIN_SECONDS)


def test_a_redis_that_is_cut_off_is_named_and_counts_again(stack):
    redis = stack.container("redis")
    stack.hits()
    docker("network", "disconnect", stack.network, redis.name)
    try:
        error = eventually(lambda: stack.get().json["redis_error"], 5)
        assert "redis:6379" in error or "Timeout" in error
    finally:
        docker("network", "connect", "--alias", "redis", stack.network, redis.name)
    eventually(lambda: ping(redis), 5)
    eventually(lambda: counts(stack.get), BACK_WITHIN_SECONDS)


@pytest.fixture
def network():
    """A network without Redis."""
    name = f"{RUN}-network"
    docker("network", "create", name)
    yield name
    docker("network", "rm", name)


@contextlib.contextmanager
def something_else(image, network):
    """A server at redis:6379 that speaks HTTP."""
    with container(image, "--network", network, "--network-alias", "redis", "--env", "PORT=6379", wait=False) as made:
        docker("start", made.name)
        yield


@pytest.mark.parametrize(
    ("options", "before", "cause"),
    [
        pytest.param([], None, "redis:6379", id="no-such-name"),
        pytest.param(["--dns", "192.0.2.1"], None, "redis:6379", id="no-answer-to-the-look-up"),
        pytest.param([], something_else, "Protocol error", id="something-else-answers"),
    ],
)
def test_what_is_no_redis_at_first_is_named_and_counts_once_it_is(image, network, options, before, cause):
    with contextlib.ExitStack() as cleanup:
        if before:
            other = cleanup.enter_context(contextlib.ExitStack())
            other.enter_context(before(image, network))
        web = cleanup.enter_context(
            container(image, "--network", network, "--env", "REDIS_HOST=redis", *options, wait=False)
        )
        docker("start", web.name)
        eventually(lambda: cause in web.get().json["redis_error"], 10)
        with Visitors(web.port(), count=16) as visitors:
            assert max(probe(web.port(), times=30, every=0.05)) < FIRST_WAIT_SECONDS
            if before:
                other.close()
            cleanup.enter_context(redis_in(network, "--network-alias", "redis"))
            eventually(lambda: counts(web.get), BACK_WITHIN_SECONDS)
        visitors.numbers()


# The service's own processes


def test_a_killed_worker_is_replaced_while_the_other_answers(stack):
    web = stack.container("web")
    workers = "print(open('/proc/1/task/1/children').read())"
    before = web.python(workers).split()
    assert len(before) == 2
    uptime = stack.get("/health").json["uptime_seconds"]
    with Visitors(stack.port, count=4) as visitors:
        time.sleep(0.5)
        web.python(f"import os; os.kill({before[0]}, 9)")
        after = eventually(lambda: (now := web.python(workers).split()) != before and len(now) == 2 and now, 5)
        time.sleep(1)
        uptimes = [stack.get("/health").json["uptime_seconds"] for _ in range(20)]
    assert before[1] in after
    assert min(uptimes) >= uptime
    assert max(uptimes) - min(uptimes) <= 1, "the same whichever worker answers"
    assert len(visitors.failures) <= 8, "of each client what the dead worker held, and what still reached its socket"
    assert web.inspect()["RestartCount"] == 0


# Connects and asks as fast as it can, until nobody listens; prints how many were answered and how many were not.
ASK_UNTIL_REFUSED = """
import collections, json, socket, sys, threading
outcomes = collections.Counter()
def ask():
    while True:
        try:
            connection = socket.create_connection((sys.argv[1], 8080), timeout=15)
        except OSError:
            return
        with connection:
            try:
                connection.sendall(b"GET / HTTP/1.1\\r\\nHost: web\\r\\nConnection: close\\r\\n\\r\\n")
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
                whole = answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"}\\n")
                assert whole or not answer, answer
                outcomes["cut" if not whole else "null" if b'"hit_count":null' in answer else "answered"] += 1
            except ConnectionError:
                outcomes["reset"] += 1
            except OSError as error:
                outcomes[type(error).__name__] += 1
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
print("asking", flush=True)
for thread in threads: thread.join()
print(json.dumps(outcomes), flush=True)
"""


def test_sigterm_under_load_leaves_no_accepted_request_without_an_answer(image, network):
    """Every hit that was counted is answered, and the end is in time.

    A connection whose request the server has not begun to read when it stops is closed without an answer and without
    a hit: at most one of each of the eight clients at each of the two workers.
    """
    with (
        redis_in(network, "--network-alias", "redis") as redis,
        container(image, "--network", network, "--env", "REDIS_HOST=redis") as web,
    ):
        eventually(lambda: counts(web.get), 5)
        redis.run("redis-cli", "del", "lab25_hits")
        command = ["python", "-c", ASK_UNTIL_REFUSED, web.address(network)]
        with container(image, "--network", network, wait=False, command=command) as client:
            docker("start", client.name)
            eventually(lambda: "asking" in client.log(), 10)
            time.sleep(2)
            began = time.monotonic()
            docker("stop", web.name)
            assert time.monotonic() - began < STOP_UNDER_LOAD_SECONDS
            assert web.inspect()["State"]["ExitCode"] == 0
            outcomes = json.loads(eventually(lambda: client.log().partition("asking\n")[2], 20))
        counted = int(redis.run("redis-cli", "get", "lab25_hits").stdout)
    answered = outcomes.pop("answered")
    assert answered == counted > 100
    assert outcomes.pop("reset", 0) + outcomes.pop("cut", 0) <= 16
    outcomes.pop("null", None)  # from a worker that still waits to ask Redis again after its start
    assert outcomes == {}


@pytest.mark.slow
def test_several_containers_hand_out_ten_thousand_different_numbers(image, network):
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(redis_in(network, "--network-alias", "redis"))
        options = ["--network", network, "--env", "REDIS_HOST=redis"]
        webs = [cleanup.enter_context(container(image, *options)) for _ in range(3)]
        ports = [web.port() for web in webs]
        eventually(lambda: all(counts(web.get) for web in webs), 5)
        first = webs[0].get().json["hit_count"]

        def visit(number):
            return get(ports[number % 3]).json["hit_count"]

        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            numbers = list(pool.map(visit, range(10_000)))
    assert sorted(numbers) == list(range(first + 1, first + 10_001))
