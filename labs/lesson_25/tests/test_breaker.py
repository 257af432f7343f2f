"""The circuit breaker: which requests wait for a Redis that fails, and when hits count again."""

import concurrent.futures
import contextlib
import threading
import types

import pytest
import redis

from harness.clients import eventually, hit, redis_ok
from harness.limits import BACK_WITHIN_SECONDS
from harness.peers import patient_url, peer

FROZEN = redis.TimeoutError("frozen")
REASON = "TimeoutError: frozen"


class StubRedis:
    """A client whose operations raise `error`, if there is one; `calls` counts them."""

    def __init__(self):
        self.error = None
        self.calls = 0
        self.hits = 0

    def incr(self, _, amount):
        self.calls += 1
        if self.error:
            raise self.error
        self.hits += amount
        return self.hits


@pytest.fixture
def stub(app, monkeypatch):
    """The Redis that the app calls."""
    made = StubRedis()
    monkeypatch.setattr(app, "_redis_client", made)
    return made


@pytest.fixture
def clock(app, monkeypatch):
    """The app's clock, which moves only when a test changes `seconds`."""
    made = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(app, "time", types.SimpleNamespace(monotonic=lambda: made.seconds))
    return made


def hits_at_once(app, pool, number):
    """Return the futures of as many hits, each in a thread of its own."""
    return [pool.submit(hit, app.app.test_client()) for _ in range(number)]


def test_outage_costs_one_call_per_second(app, client, stub, clock):
    stub.error = FROZEN
    for _ in range(5):
        assert hit(client) == (None, REASON)
        assert redis_ok(client) is False
    assert stub.calls == 1, f"{stub.calls} requests waited for a Redis that fails, instead of 1"
    clock.seconds += 1
    for _ in range(5):
        assert hit(client) == (None, REASON)
    assert stub.calls == 2, f"a second later {stub.calls - 1} requests try again, instead of 1"
    # If Redis returns during a trial, this trial fails, and a second later the next one succeeds.
    assert app.STEP_SECONDS + 1 < BACK_WITHIN_SECONDS


@pytest.mark.parametrize("first", [hit, redis_ok])
def test_any_request_opens_and_closes_breaker(client, stub, clock, first):
    stub.error = FROZEN
    first(client)
    assert hit(client) == (None, REASON)
    stub.error = None
    assert hit(client) == (None, REASON)
    assert stub.calls == 1, "a request waited although another had found the outage"
    clock.seconds += 1
    first(client)
    numbers = [hit(client)[0], hit(client)[0]]
    assert numbers in ([1, 2], [2, 3]), f"a trial succeeded, but the next hits are {numbers}"


def test_eight_threads_run_one_trial(app, client, stub, clock, monkeypatch):
    started, ends, reply = threading.Event(), threading.Event(), threading.Event()

    def end_during_trial(_):
        started.set()
        ends.wait(20)

    def wait_for_reply(*_):
        stub.calls += 1
        reply.wait(20)
        return 1

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        earlier = pool.submit(app.call_redis, end_during_trial)
        assert started.wait(10)
        stub.error = FROZEN
        hit(client)
        clock.seconds += 1
        monkeypatch.setattr(stub, "incr", wait_for_reply)
        hits = hits_at_once(app, pool, 8)
        others = "seven of eight requests return during the trial of the eighth"
        eventually(lambda: sum(one.done() for one in hits) == 7, 10, broken=others)
        ends.set()
        earlier.result(10)
        clock.seconds += 10  # a trial may take longer than the wait for the next one
        (ninth,) = hits_at_once(app, pool, 1)
        eventually(ninth.done, 10, broken="a request returns during a trial that takes long")
        reply.set()
    assert stub.calls == 2, f"{stub.calls - 1} trials ran at the same time, instead of 1"
    assert [one.result() for one in hits].count((1, None)) == 1


@pytest.mark.parametrize("death", [SystemExit(), KeyError()])
def test_trial_that_dies_is_followed_by_another(app, client, stub, clock, death):
    stub.error = FROZEN
    hit(client)
    clock.seconds += 1
    stub.error = death
    with pytest.raises(type(death)):
        app.call_redis(app.add_hits, 1)
    stub.error = None
    clock.seconds += 1
    result = hit(client)
    assert result == (1, None), f"after a trial that died, the breaker stays open: {result}"


@pytest.mark.parametrize("end", [None, FROZEN, KeyError()])
def test_operation_from_before_outage_does_not_end_it(app, client, stub, clock, end):
    def end_in_outage(_):
        stub.error = FROZEN
        hit(client)
        clock.seconds += 0.5
        if end:
            raise end

    with contextlib.suppress(KeyError):
        app.call_redis(end_in_outage)
    assert hit(client) == (None, REASON)
    assert stub.calls == 1, "a trial started early"
    stub.error = None
    clock.seconds += 1
    assert hit(client) == (1, None), "no trial started a second after the failure"


def test_moved_redis_is_followed_by_every_connection(app, client, clock, monkeypatch):
    """The old server keeps its three connections, and a new one takes over its address."""
    together = threading.Barrier(3)
    moved = threading.Event()

    def reply_of_old_server(_):
        if moved.is_set():
            return b"-READONLY You can't write against a read only replica.\r\n"
        together.wait(5)
        return b":1\r\n"

    with contextlib.ExitStack() as cleanup:
        pool = cleanup.enter_context(concurrent.futures.ThreadPoolExecutor(3))
        with peer(reply_of_old_server) as port:
            monkeypatch.setenv("REDIS_URL", patient_url(port))
            app.get_redis_client()
            hits = [one.result() for one in hits_at_once(app, pool, 3)]
            assert hits == [(1, None)] * 3
        moved.set()
        cleanup.enter_context(peer(lambda _: b":2\r\n", port=port))
        assert "read only" in hit(client)[1]
        clock.seconds += 1
        hits = [hit(client), *(one.result() for one in hits_at_once(app, pool, 3))]
    assert hits == [(2, None)] * 4, f"hits still go to where Redis was: {hits}"


def test_outage_and_return_are_logged_once(client, stub, clock, caplog):
    for error in (FROZEN, OSError("gone"), None):
        stub.error = error
        for _ in range(20):
            hit(client)
            redis_ok(client)
            clock.seconds += 0.3
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "Redis failed, hits are not counted: TimeoutError: frozen",
        "Redis is back, hits are counted again",
    ], f"the log must have one line for an outage and one for its end, got {lines}"


def test_stuck_log_delays_no_other_request(app, client, stub, clock, monkeypatch):
    stuck, continues = threading.Event(), threading.Event()
    continued = []

    def get_stuck_once(*_):
        if not stuck.is_set():
            stuck.set()
            continued.append(continues.wait(10))

    monkeypatch.setattr(app.app.logger, "warning", get_stuck_once)
    stub.error = FROZEN
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hits_at_once(app, pool, 1)
        assert stuck.wait(10)
        stub.error = None
        clock.seconds += 1
        assert hit(client) == (1, None)
        continues.set()
    assert continued == [True], "a request waited while the log was stuck"
