"""HTTP as the tests' clients speak it."""

import collections
import contextlib
import http.client
import itertools
import json
import math
import socket
import threading
import time

from harness.limits import PATIENCE_SECONDS

Answer = collections.namedtuple("Answer", "status headers json")
FAILURES = (OSError, http.client.HTTPException)
NO_ANSWER_SECONDS = 20


def get(port, path="/", timeout=5):
    """Return the Answer to one GET on a connection of its own.

    Raises one of FAILURES where none comes within `timeout` seconds.
    """
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    ) as connection:
        return ask(connection, path)


def ask(connection, path="/"):
    """Return the Answer to one GET; leave the connection open."""
    connection.request("GET", path)
    response = connection.getresponse()
    return Answer(response.status, response.headers, json.loads(response.read()))


def timed(function, *arguments, **options):
    """Return the seconds that a call takes."""
    began = time.monotonic()
    function(*arguments, **options)
    return time.monotonic() - began


def seconds_to(port, path="/"):
    """Return the seconds to an answer, infinity where none came in NO_ANSWER_SECONDS.

    Fail where it was no 200.
    """
    began = time.monotonic()
    try:
        assert get(port, path, NO_ANSWER_SECONDS).status == 200
    except FAILURES:
        return math.inf
    return time.monotonic() - began


def probe(port, times, every):
    """Return the seconds to each answer of /health, asked once in `every` seconds.

    After an answer that took longer it is asked again at once.
    """
    waits = [0.0]
    for _ in range(times):
        time.sleep(max(0, every - waits[-1]))
        waits.append(seconds_to(port, "/health"))
    return waits[1:]


def counted(answer):
    """Return the number of a hit. Raises ConnectionError, with the reason where it has none."""
    if answer.json["redis_error"]:
        raise ConnectionError(answer.json["redis_error"])
    return answer.json["hit_count"]


def every_hit_counts(port, hits=20):
    """Return whether as many hits in a row are counted, which meets every worker.

    Raises as `counted` does.
    """
    return all(counted(get(port)) for _ in range(hits))


def eventually(condition, seconds=PATIENCE_SECONDS, every=0.05, broken="what was waited for"):
    """Return the first true result of `condition`, called until then.

    After `seconds` it fails. Its message begins with `broken`, the promise that is broken then.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := condition():
                return result
            problem = f"{result!r}"
        except FAILURES as error:
            problem = repr(error)
        assert time.monotonic() < deadline, (
            f"{broken}: not within {seconds} seconds, at last {problem}"
        )
        time.sleep(every)


@contextlib.contextmanager
def serving(server):
    """Let a socketserver serve in a `with` block; yield its port."""
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def slow_clients(port, count=200):
    """Yield connections that, in a `with` block, each send a byte of a header every half second."""
    stop = threading.Event()
    with contextlib.ExitStack() as cleanup:
        made = [
            cleanup.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            for _ in range(count)
        ]
        for connection in made:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ")

        def go_on():
            # One after the other, not in a burst that holds up who measures.
            for connection in itertools.cycle(made):
                if stop.wait(0.5 / count):
                    return
                with contextlib.suppress(OSError):  # the server has lost patience with it
                    connection.sendall(b"a")

        thread = threading.Thread(target=go_on)
        thread.start()
        cleanup.callback(thread.join)
        cleanup.callback(stop.set)
        yield made


class Visitors:
    """Clients that ask for / all the time, in a `with` block.

    What each was answered is in its list of `answers`; `failures` holds what came instead of an
    answer. Each client keeps its connection: a new one for every request would use up the ports of
    the engine's proxy, which has 28,000 a minute, and then resets connections.
    """

    def __init__(self, port, count=8, pause=0.0):
        self.port = port
        self.pause = pause  # seconds
        self.answers = [[] for _ in range(count)]
        self.failures = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._visit, args=[answers]) for answers in self.answers
        ]

    def _visit(self, answers):
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        ) as connection:
            while not self._stop.wait(self.pause):
                try:
                    answers.append(ask(connection))
                except FAILURES as error:
                    self.failures.append(error)
                    connection.close()  # the next request opens it anew

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def count(self):
        """Return how many hits were counted so far."""
        given = [answer for answers in self.answers for answer in answers]
        return sum(answer.json.get("hit_count") is not None for answer in given)

    def numbers(self):
        """Return the numbers handed out, a list for each client.

        Fail where a request had no answer, or one that was no 200, or neither number nor reason.
        """
        failed = self.failures
        assert not failed, f"{len(failed)} requests had no answer, the first: {failed[:3]}"
        given = [answer for answers in self.answers for answer in answers]
        statuses = {answer.status for answer in given}
        assert statuses == {200}, f"answers were not all 200: {statuses}"
        for answer in given:
            number, error = answer.json["hit_count"], answer.json["redis_error"]
            assert (number is None) != (error is None), f"number or reason: {answer.json}"
        return [
            [answer.json["hit_count"] for answer in answers if answer.json["hit_count"] is not None]
            for answers in self.answers
        ]
