"""HTTP as the tests' clients speak it: one connection for each request."""

import collections
import contextlib
import http.client
import json
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
