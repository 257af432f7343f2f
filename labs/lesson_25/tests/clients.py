"""HTTP as the tests' clients speak it: one connection for each request."""

import collections
import contextlib
import http.client
import json
import threading
import time

Answer = collections.namedtuple("Answer", "status headers json")
FAILURES = (OSError, http.client.HTTPException)


def get(port, path="/", host="127.0.0.1", timeout=5):
    """Return the Answer to one GET. Raises one of FAILURES where none comes within `timeout` seconds."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return Answer(response.status, response.headers, json.loads(response.read()))


def eventually(condition, seconds, every=0.05):
    """Return the first true result of `condition`, called until then; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := condition():
                return result
            problem = f"{result!r}"
        except FAILURES as error:
            problem = repr(error)
        assert time.monotonic() < deadline, f"not within {seconds} seconds, at last: {problem}"
        time.sleep(every)


class Visitors:
    """Clients that call `ask` all the time, in a `with` block; what each was answered is in its list of `answers`.

    `failures` holds what came instead of an answer.
    """

    def __init__(self, ask, count=8, pause=0.0):
        self.ask = ask
        self.pause = pause
        self.answers = [[] for _ in range(count)]
        self.failures = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._visit, args=[answers]) for answers in self.answers]

    def _visit(self, answers):
        while not self._stop.wait(self.pause):
            try:
                answers.append(self.ask())
            except FAILURES as error:
                self.failures.append(error)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def numbers(self):
        """Return the numbers handed out, a list for each client; fail where an answer was none, or no 200."""
        assert not self.failures, self.failures[:3]
        assert {answer.status for answers in self.answers for answer in answers} == {200}
        for answers in self.answers:
            for answer in answers:
                assert (answer.json["hit_count"] is None) != (answer.json["redis_error"] is None), answer.json
        return [
            [answer.json["hit_count"] for answer in answers if answer.json["hit_count"] is not None]
            for answers in self.answers
        ]
