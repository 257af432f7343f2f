"""The watch: who finds out that Redis went and that hits are counted again, and what the log says.

These tests call the watch's thread step by step, so that nothing depends on a time.
"""

import concurrent.futures
import contextlib
import sys
import threading

import fakeredis
import pytest
import redis

import watch as watch_module
from app import Failure
from harness.clients import eventually
from harness.limits import BACK_WITHIN_SECONDS
from harness.peers import peer


class CountingFakeRedis(fakeredis.FakeRedis):
    """A stand-in that notes which commands it was asked, and fails those in `failures`."""

    def __init__(self, **options):
        super().__init__(**options)
        self.asked = []
        self.failures = {}

    def execute_command(self, name, *arguments, **options):
        if name in self.failures:
            self.asked.append(name)
            raise self.failures[name]
        counts_nothing = name == "INCRBY" and arguments[1] == 0
        self.asked.append("INCRBY 0" if counts_nothing else name)
        return super().execute_command(name, *arguments, **options)


@pytest.fixture
def server(app, monkeypatch):
    """The stand-in for Redis that the app asks."""
    made = CountingFakeRedis(server=fakeredis.FakeServer())
    monkeypatch.setattr(app, "_redis_client", made)
    return made


@pytest.fixture
def watch(app, monkeypatch):
    """The breaker of the app, without its thread: the test calls look() in its place."""
    made = watch_module.CircuitBreaker()
    monkeypatch.setattr(app, "breaker", made)
    return made


@pytest.fixture
def clock(monkeypatch):
    """The watch's clock, which the test sets: a list with the seconds."""
    now = [1000.0]
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now[0])
    return now


def failure(kind, text):
    """Return the failure of a request, as app.py reports it."""
    return Failure(kind, f"{kind}: {text}")


def hit(client):
    """Return (hit_count, redis_error) of one GET /."""
    response = client.get("/")
    assert response.status_code == 200, f"GET / must never fail: {response.text}"
    return response.json["hit_count"], response.json["redis_error"]


# Who asks, and when


def test_one_request_meets_an_outage_and_no_other_asks_until_the_watch_has_ended_it(
    client, server, watch
):
    server.failures["INCRBY"] = redis.TimeoutError("Timeout reading from socket")
    reason = "TimeoutError: Timeout reading from socket"
    assert hit(client) == (None, reason)
    for _ in range(5):
        assert hit(client) == (None, reason)
        assert client.get("/health").json["redis_ok"] is False
    assert server.asked == ["INCRBY"], "requests asked although the outage was known"
    watch.look()
    assert hit(client) == (None, reason), "the outage ended while hits still failed"
    server.failures.clear()
    watch.look()
    assert hit(client) == (1, None), "the outage did not end though hits can be counted"


def test_health_that_fails_tells_the_others_too(client, server, watch):
    server.failures["PING"] = redis.ConnectionError("gone")
    assert client.get("/health").json["redis_ok"] is False
    assert hit(client) == (None, "ConnectionError: gone")


def test_a_redis_that_answers_pings_and_holds_hits_back_stays_an_outage(client, server, watch):
    """As in CLIENT PAUSE WRITE: a PING must not end what a hit has met."""
    server.failures["INCRBY"] = redis.TimeoutError("Timeout reading from socket")
    hit(client)
    for _ in range(3):
        watch.look()
        assert client.get("/health").json["redis_ok"] is False
        assert hit(client)[0] is None
    assert "PING" not in server.asked


def test_in_good_times_the_watch_asks_a_ping_which_costs_no_write(client, server, watch):
    hit(client)
    server.asked.clear()
    watch.look()
    watch.look()
    assert server.asked == ["PING", "PING"]


def test_the_watch_finds_an_outage_by_itself(client, server, watch):
    server.failures["PING"] = redis.ConnectionError("gone")
    server.failures["INCRBY"] = redis.ConnectionError("gone")
    watch.look()
    server.asked.clear()
    assert hit(client) == (None, "ConnectionError: gone")
    assert server.asked == []


def test_half_the_time_until_hits_count_again_is_left_for_a_new_connection(app):
    """The other half goes to the pause, and to a question that was asked a moment too early."""
    spent = watch_module.PAUSE_SECONDS + app.WAIT_SECONDS
    assert spent <= BACK_WITHIN_SECONDS / 2, (
        f"hits count again within {BACK_WITHIN_SECONDS} s, but the watch may need {spent} s"
        " before it connects"
    )


def test_what_ends_an_outage_counts_nothing(client, server, watch):
    assert hit(client) == (1, None)
    watch.begin_outage(failure("ConnectionError", "gone"))
    watch.look()
    assert "INCRBY 0" in server.asked
    assert hit(client) == (2, None)


def test_a_failure_that_comes_while_the_watch_asks_is_not_taken_back(client, server, watch):
    """Its question was asked before: it says nothing of what failed since."""
    watch.begin_outage(failure("ConnectionError", "first"))

    def answer_late(*_):
        watch.begin_outage(failure("ConnectionError", "second"))
        return 7

    server.incrby = answer_late
    watch.look()
    assert hit(client) == (None, "ConnectionError: second")
    del server.incrby
    watch.look()
    assert hit(client)[1] is None


@pytest.mark.parametrize("answer", [b"OK", None, True])
def test_an_answer_that_is_no_number_ends_no_outage(client, server, watch, monkeypatch, answer):
    watch.begin_outage(failure("ConnectionError", "gone"))
    monkeypatch.setattr(server, "incrby", lambda *_: answer)
    watch.look()
    assert repr(answer) in hit(client)[1]


@pytest.mark.parametrize("trouble", [SystemExit("no"), KeyboardInterrupt(), MemoryError()])
def test_whatever_the_watch_meets_it_goes_on_and_ends_the_outage(
    client, server, watch, monkeypatch, caplog, trouble
):
    monkeypatch.setattr(watch_module, "PAUSE_SECONDS", 0.01)
    troubles = [trouble] * 3
    ended = threading.Event()
    ask = watch_module.app.ask_redis_now

    def ask_in_trouble(question):
        if troubles:
            raise troubles.pop()
        if ended.is_set():
            raise EndOfThread
        return ask(question)

    class EndOfThread(BaseException):
        """Ends the watch's thread, which nothing in the product does."""

    def log_or_end(*_):
        if ended.is_set():
            raise EndOfThread

    monkeypatch.setattr(watch_module.app, "ask_redis_now", ask_in_trouble)
    watch.begin_outage(failure("ConnectionError", "gone"))
    monkeypatch.setattr(watch_module.app.app.logger, "exception", log_or_end)

    def run_to_its_end():
        with pytest.raises(EndOfThread):
            watch._watch()

    thread = threading.Thread(target=run_to_its_end)
    thread.start()
    try:
        eventually(
            lambda: watch.outage is None, broken="after a failure of the watch an outage never ends"
        )
    finally:
        ended.set()
        thread.join()
    assert not troubles


def test_the_thread_looks_at_once_when_a_look_at_once(client, server, watch, monkeypatch):
    monkeypatch.setattr(watch_module, "PAUSE_SECONDS", 60)
    looked = threading.Semaphore(0)
    ended = threading.Event()

    def look():
        looked.release()
        if ended.is_set():
            sys.exit()  # ends the thread

    monkeypatch.setattr(watch, "look", look)
    watch.start_watch()
    assert looked.acquire(timeout=10), "the thread does not look when it starts"
    assert not looked.acquire(timeout=0.2), "the thread does not pause between two questions"
    watch.begin_outage(failure("ConnectionError", "gone"))
    assert looked.acquire(timeout=10), "a failed request does not wake the thread"


def test_connections_to_where_redis_was_are_not_used_again(app, client, watch, monkeypatch):
    """Three hits at once leave three connections; after a move none of them may be asked."""
    moved = threading.Event()
    together = threading.Barrier(3)

    def at_the_old_place(said):
        if moved.is_set():
            return b"-READONLY You can't write against a read only replica.\r\n"
        together.wait(5)
        return b":1\r\n"

    def at_the_new_place(said):
        return b":2\r\n"

    def three_hits():
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda _: hit(app.app.test_client()), range(3)))

    with contextlib.ExitStack() as peers:
        old_port = peers.enter_context(peer(at_the_old_place))
        new_port = peers.enter_context(peer(at_the_new_place))
        monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
        monkeypatch.setenv("REDIS_PORT", str(old_port))
        app.get_redis_client()
        assert three_hits() == [(1, None)] * 3
        moved.set()
        app.get_redis_client().get_connection_kwargs()["port"] = new_port
        for connection in app.get_redis_client().connection_pool._available_connections:
            connection.port = new_port  # as if the name led there: a new connection goes there
        assert "read only" in hit(client)[1]
        watch.look()
        hits = three_hits()
        assert hits == [(2, None)] * 3, f"hits still go to where Redis was: {hits}"


# What the log says


@pytest.fixture
def lines(caplog):
    """A function that returns the lines that the log has got since it was called last."""

    def new():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return new


def test_says_once_that_redis_went_and_once_that_hits_are_counted_again(
    client, server, watch, clock, lines
):
    gone = redis.ConnectionError("gone")
    server.failures.update({"PING": gone, "INCRBY": gone})
    for _ in range(20):
        hit(client)
        watch.look()
        clock[0] += 1
    assert lines() == ["Redis failed, hits are not counted: ConnectionError: gone"]
    server.failures.clear()
    for _ in range(20):
        watch.look()
        hit(client)
        clock[0] += 1
    assert lines() == ["Redis is back, hits are counted again"]


def test_says_both_also_where_the_outage_was_short(client, server, watch, clock, lines):
    """A hit may fail where the watch's next question does not: that must be told, too."""
    watch.begin_outage(failure("ConnectionError", "gone"))
    watch.look()
    assert watch.outage is None
    assert lines() == ["Redis failed, hits are not counted: ConnectionError: gone"]
    clock[0] += 10
    watch.look()
    assert lines() == ["Redis is back, hits are counted again"]


def test_says_a_new_reason_when_the_kind_of_reason_changes(client, server, watch, clock, lines):
    for text in ("Connection refused", "Connection reset"):
        watch.begin_outage(failure("ConnectionError", text))
        server.failures["INCRBY"] = redis.ConnectionError(text)
        watch.look()
        clock[0] += 10
    assert len(lines()) == 1
    server.failures["INCRBY"] = redis.exceptions.ReadOnlyError("a read only replica")
    watch.look()
    watch.look()
    assert lines() == ["Redis failed, hits are not counted: ReadOnlyError: a read only replica"]


def test_a_redis_that_fails_in_turns_makes_a_line_every_few_seconds(
    client, server, watch, clock, lines
):
    for _ in range(300):  # in thirty seconds
        watch.begin_outage(failure("ReadOnlyError", "a read only replica"))
        watch.look()
        watch.look()
        clock[0] += 0.1
    assert 2 <= len(lines()) <= 11


def test_a_change_while_the_log_is_silent_is_told_later(client, server, watch, clock, lines):
    server.failures["INCRBY"] = redis.ConnectionError("gone")
    hit(client)
    watch.look()
    server.failures["INCRBY"] = redis.exceptions.OutOfMemoryError("no room")
    watch.look()
    watch.look()
    assert len(lines()) == 1
    clock[0] += 10
    watch.look()
    assert lines() == ["Redis failed, hits are not counted: OutOfMemoryError: no room"]


def test_no_request_waits_for_a_log_that_is_blocked(app, client, server, watch, monkeypatch):
    blocked = threading.Event()
    unblocked = threading.Event()

    def block(*_):
        blocked.set()
        unblocked.wait(10)

    monkeypatch.setattr(app.app.logger, "warning", block)
    watch.begin_outage(failure("ConnectionError", "gone"))
    looking = threading.Thread(target=watch.look)
    looking.start()
    try:
        assert blocked.wait(10)
        assert client.get("/health").status_code == 200
        assert hit(client) == (None, "ConnectionError: gone")
        assert looking.is_alive(), "they were answered only when the log went on"
    finally:
        unblocked.set()
        looking.join()
