"""HTTP clients of the service, and how the tests wait for an event."""

import collections
import contextlib
import http.client
import json
import threading
import time

from harness.limits import PATIENCE_SECONDS

Answer = collections.namedtuple("Answer", "status headers json")
FAILURES = (OSError, http.client.HTTPException)


def get(port, path="/", timeout=5):
    """Return the Answer to one GET on a new connection.

    Raise one of FAILURES if there is none within `timeout` seconds.
    """
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    ) as connection:
        return ask(connection, path)


def ask(connection, path="/"):
    """Return the Answer to one GET, and leave the connection open."""
    connection.request("GET", path)
    response = connection.getresponse()
    return Answer(response.status, response.headers, json.loads(response.read()))


def hit(client):
    """Return (hit_count, redis_error) of one GET / by a Flask test client."""
    fields = _fields(client, "/")
    return fields["hit_count"], fields["redis_error"]


def redis_ok(client):
    """Return `redis_ok` of one GET /health by a Flask test client."""
    return _fields(client, "/health")["redis_ok"]


def _fields(client, path):
    response = client.get(path)
    assert response.status_code == 200, f"GET {path} must always be a 200, got {response.text}"
    return response.json


def counted(answer):
    """Return the number of a hit. Raise ConnectionError with the reason if it has none."""
    if answer.json["redis_error"]:
        raise ConnectionError(answer.json["redis_error"])
    return answer.json["hit_count"]


def eventually(condition, seconds=PATIENCE_SECONDS, every=0.05, broken="the awaited event"):
    """Return the first true result of `condition`, which is called until then.

    Fail after `seconds`, with a message that starts with `broken`: what does not work then.
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
            f"{broken}: not within {seconds} seconds, last result {problem}"
        )
        time.sleep(every)


@contextlib.contextmanager
def serving(server):
    """Run a socketserver during a `with` block; yield its port."""
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class Visitors:
    """Clients that request / continuously during a `with` block.

    `answers` has all Answers, `failures` the errors of requests without one. Each client keeps its
    connection, because a new one for each request would use up the ports of the engine's proxy: it
    has 28,000 a minute, and then resets connections.
    """

    def __init__(self, port, count=8, pause=0.0):
        self.port = port
        self.pause = pause  # seconds
        self.answers = []
        self.failures = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._visit) for _ in range(count)]

    def _visit(self):
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        ) as connection:
            while not self._stop.wait(self.pause):
                try:
                    self.answers.append(ask(connection))
                except FAILURES as error:
                    self.failures.append(error)
                    connection.close()  # the next request opens it again

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def count(self):
        """Return how many hits have been counted so far."""
        return sum(answer.json.get("hit_count") is not None for answer in list(self.answers))

    def numbers(self):
        """Return the numbers of all counted hits.

        Fail if a request has no answer, or one without number and reason, or if a number was given
        twice.
        """
        failed = self.failures
        assert not failed, f"{len(failed)} requests had no answer, the first: {failed[:3]}"
        numbers = []
        for status, _, fields in self.answers:
            assert status == 200, f"every answer must be a 200, got {status}: {fields}"
            if fields["redis_error"] is None:
                numbers.append(fields["hit_count"])
        assert None not in numbers, "an answer has neither number nor reason"
        assert len(numbers) == len(set(numbers)), "a number was given twice"
        return numbers
