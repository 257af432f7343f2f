"""The service while things around it go wrong, with clients asking meanwhile."""

import contextlib
import itertools
import json
import time

import pytest

import watch
from harness import limits
from harness.clients import Visitors, counted, eventually, every_hit_counts, probe
from harness.engine import Container, container, docker, kill, ping, redis_in

pytestmark = pytest.mark.engine


FAILED = "Redis failed, hits are not counted: "
BACK = "Redis is back, hits are counted again"


class NewLines:
    """The lines that a container's log has got since this was made."""

    def __init__(self, container):
        self._container = container
        self._old = len(container.log().splitlines())

    def __call__(self, words=""):
        """Return the new lines with these words."""
        new = self._container.log().splitlines()[self._old :]
        return [line for line in new if words in line]


def all_count(stack):
    """Wait until both workers count hits."""
    broken = "not every worker counts hits again"
    eventually(lambda: every_hit_counts(stack.port), broken=broken)


def when_both_workers_count(stack):
    """Wait until both workers count and have told it, whatever an earlier test did to Redis."""
    web = stack.container("web")
    lines = NewLines(web)
    all_count(stack)
    if FAILED in web.log():  # what a worker tells next may be held back for so long
        time.sleep(watch.QUIET_SECONDS + watch.PAUSE_SECONDS)
    assert all(BACK in line for line in lines()), f"Redis failed meanwhile: {lines()}"


# Redis goes, and comes back


@pytest.mark.slow
def test_redis_going_nine_times_costs_no_answer_and_no_number(stack):
    """Stopped and started, killed, restarted: never a 5xx, no number twice, none lost."""
    web = stack.container("web")
    redis = stack.container("redis")
    new_lines = NewLines(web)

    def stop_and_start():
        docker("stop", redis.name)
        time.sleep(1)
        docker("start", redis.name)

    def crash():
        kill(redis.name)

    def restart():
        docker("restart", redis.name)

    with Visitors(stack.port) as visitors:
        for fault in [stop_and_start, crash, restart] * 3:
            fault()
            eventually(lambda: ping(redis))
            stack.hits()
    numbers = visitors.numbers()
    assert all(own == sorted(own) for own in numbers), "a client saw the count go back"
    everyone = list(itertools.chain(*numbers))
    assert len(everyone) == len(set(everyone)), "a number was given twice"
    assert len(everyone) > 100, "there was too little to see"
    assert stack.hits() > max(everyone), "a number was given and then lost"
    web.wait_for(lambda: len(new_lines(BACK)) >= limits.WORKERS)
    failed = new_lines(FAILED)
    # Of faults that come quickly one after the other the log tells fewer, at least one.
    assert limits.WORKERS <= len(failed) <= 36, f"at most two for each fault and worker: {failed}"
    assert len(new_lines()) <= 2 * len(failed), f"more was told than that: {new_lines()}"


@contextlib.contextmanager
def writes_held_back(redis):
    """Let Redis answer a PING and hold hits back, as in a planned failover."""
    redis.run("redis-cli", "client", "pause", "60000", "write")
    try:
        yield
    finally:
        redis.run("redis-cli", "client", "unpause")


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("trouble", [Container.frozen, writes_held_back])
def test_a_redis_that_does_not_answer_holds_up_health_once_and_is_told_once(stack, trouble):
    """With 64 clients on `/`; and what waits does not pile up in memory."""
    web = stack.container("web")
    redis = stack.container("redis")
    with Visitors(stack.port, count=64):
        time.sleep(3)
    memory_before = web.memory_bytes()
    when_both_workers_count(stack)
    new_lines = NewLines(web)
    with Visitors(stack.port, count=64) as visitors:
        time.sleep(1)
        with trouble(redis):  # long enough for the engine's own health check
            waits = probe(stack.port, times=200, every=0.06)
        eventually(lambda: counted(stack.get()), limits.BACK_WITHIN_SECONDS)
    slowest = max(waits)
    late = [wait for wait in waits if wait > 3 * limits.AT_ONCE_SECONDS]
    assert slowest < limits.FIRST_WAIT_SECONDS, f"/health took {slowest:.2f} s"
    assert len(late) <= limits.WORKERS, f"/health waited more than once for each worker: {late}"
    failing = web.inspect()["State"]["Health"]["FailingStreak"]
    assert failing == 0, "the engine's health check failed because of Redis"
    visitors.numbers()
    assert len(new_lines(FAILED)) == limits.WORKERS, f"told more than once: {new_lines()}"
    growth = web.memory_bytes() / memory_before
    assert growth < limits.MEMORY_GROWTH_RATIO, f"the memory grew {growth:.2f} times"


@pytest.mark.timing
def test_each_worker_waits_once_where_only_health_is_asked_and_redis_is_frozen(stack):
    when_both_workers_count(stack)
    with stack.container("redis").frozen():
        waits = probe(stack.port, times=24, every=0.25)
    late = [wait for wait in waits if wait > limits.AT_ONCE_SECONDS]
    assert len(late) <= limits.WORKERS, f"more than one wait for each worker: {late}"
    assert max(waits) < limits.FIRST_WAIT_SECONDS, f"/health took {max(waits):.2f} s"
    all_count(stack)


def test_the_log_says_for_each_worker_that_redis_went_and_that_hits_are_counted_again(stack):
    web = stack.container("web")
    when_both_workers_count(stack)
    new_lines = NewLines(web)
    with Visitors(stack.port, count=16, pause=0.05):
        with stack.container("redis").frozen():
            web.wait_for(
                lambda: len(new_lines(f"{FAILED}TimeoutError")) == limits.WORKERS,
                broken="not every worker tells that Redis is away",
            )
        web.wait_for(
            lambda: len(new_lines(BACK)) == limits.WORKERS,
            broken="not every worker tells that Redis is back",
        )
    assert len(new_lines()) == 2 * limits.WORKERS, f"more was told: {new_lines()}"


def test_hits_are_counted_where_redis_has_moved_while_the_old_one_lives_on_as_a_replica(stack):
    stack.hits()
    with stack.redis_moved():
        all_count(stack)
    all_count(stack)


@pytest.mark.parametrize(
    "options", [[], ["--dns", "192.0.2.1"]], ids=["no-such-name", "no-answer-to-the-look-up"]
)
def test_a_name_that_leads_nowhere_is_named_and_hits_count_once_it_does(image, network, options):
    options = ["--network", network, "--env", "REDIS_HOST=redis", *options]
    with container(image, *options) as web, Visitors(web.port, count=16, pause=0.05) as visitors:
        eventually(
            lambda: "redis:6379" in web.get().json["redis_error"],
            broken="redis_error does not name the address that leads nowhere",
        )
        assert max(probe(web.port, times=30, every=0.05)) < limits.PATIENCE_SECONDS
        with redis_in(network, "--network-alias", "redis"):
            eventually(lambda: counted(web.get()), broken="no hit counts though Redis came")
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
        after = eventually(
            lambda: (now := web.python(workers).split()) != before and len(now) == 2 and now,
            broken="a killed worker is not replaced",
        )
        time.sleep(1)
        uptimes = [stack.get("/health").json["uptime_seconds"] for _ in range(20)]
    assert before[1] in after, f"one worker was killed, and the other ended: {before}, {after}"
    assert min(uptimes) >= uptime
    assert max(uptimes) - min(uptimes) <= 1, "the same whichever worker answers"
    assert len(visitors.failures) <= 8, (
        "of each client what the dead worker held, and what still reached its socket"
    )
    assert web.inspect()["RestartCount"] == 0


# Connects and asks as fast as it can, until nobody listens. Prints how many requests were answered
# with a number, how many with none, and how many connections were closed without an answer.
ASK_UNTIL_REFUSED = """
import collections, http.client, json, sys, threading
outcomes = collections.Counter()
def ask():
    while True:
        connection = http.client.HTTPConnection(sys.argv[1], 8080, timeout=15)
        try:
            connection.connect()
        except OSError:
            return
        try:
            connection.request("GET", "/", headers={"Connection": "close"})
            counted = json.load(connection.getresponse())["hit_count"] is not None
            outcomes["counted" if counted else "null"] += 1
        except ConnectionError:
            outcomes["closed"] += 1
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
print("asking", flush=True)
for thread in threads: thread.join()
print(json.dumps(outcomes))
"""


def test_sigterm_under_load_leaves_no_accepted_request_without_an_answer(image, network):
    """Every hit that was counted is answered, and the end is in time.

    A connection whose request the server has not begun to read when it stops is closed without an
    answer and without a hit: at most one of each of the eight clients at each of the two workers.
    """
    with (
        redis_in(network, "--network-alias", "redis") as redis,
        container(image, "--network", network, "--env", "REDIS_HOST=redis") as web,
    ):
        eventually(lambda: counted(web.get()), broken="no hit counts")
        redis.run("redis-cli", "del", "lab25_hits")

        def hits():
            return int(redis.run("redis-cli", "get", "lab25_hits").stdout or 0)

        command = ["python", "-c", ASK_UNTIL_REFUSED, web.address(network)]
        with container(image, "--network", network, wait=False, command=command) as client:
            docker("start", client.name)
            eventually(lambda: "asking" in client.log())
            eventually(lambda: hits() > 100, broken="fewer than 100 hits are counted")
            docker("stop", web.name)
            status = web.inspect()["State"]["ExitCode"]
            assert status == 0, f"`docker stop` under load ended it with status {status}"
            docker("wait", client.name)
            outcomes = json.loads(
                client.log().removeprefix("asking\n")
            )  # a traceback would be no JSON
        counted_hits = hits()
    assert outcomes["counted"] == counted_hits, f"{counted_hits} counted, answered: {outcomes}"
    assert outcomes.get("closed", 0) <= 16, f"too many got no answer: {outcomes}"
