"""The circuit breaker: it keeps requests from waiting for a Redis that does not count.

While all is well, requests ask Redis. When one of them fails, an outage begins: requests are then
answered at once, without asking. A thread, the watch, asks instead. When it sees that hits can be
counted, the outage ends. Every worker process has one breaker and one watch, started by serve.py.
"""

import threading
import time

import app

# The time between two questions of the watch. The README promises that hits are counted again
# within 2 s after Redis is back. Up to 0.5 s of that is this pause, and 0.5 s a question that was
# asked a moment too early. 1 s is left for a new connection: enough, unless the network is slow.
PAUSE_SECONDS = 0.5

# A worker writes at most one line in this time, even if Redis fails and answers by turns.
QUIET_SECONDS = 3


class CircuitBreaker:
    """Whether requests may ask Redis, and if not, why.

    `outage` is the latest app.Failure in an outage, or None while hits are counted. Requests
    read it. A failed request begins an outage, and so does the watch; only the watch ends one.

    A request may still be waiting for Redis when an outage ends, and fail after that. It then
    begins a new outage, which the watch ends again some milliseconds later.
    """

    def __init__(self):
        self.outage = None
        # For each change of self.outage. It is held for a moment, never while Redis is asked or the
        # log is written.
        self._lock = threading.Lock()
        self._request_has_failed = threading.Event()
        self._log = OutageLog()

    def request_failed(self, failure):
        """Begin an outage, and then wake the watch, which reads it. Requests call this."""
        self._set_outage(failure)
        self._request_has_failed.set()

    def _set_outage(self, failure):
        with self._lock:
            self.outage = failure

    def _end_outage(self, outage):
        """End this outage, but not another one that a request has begun meanwhile.

        Every failure is an object of its own. So `is` tells whether there has been another one.
        """
        with self._lock:
            if self.outage is outage:
                self.outage = None

    # The watch

    def start_watch(self):
        """Start the thread that watches Redis. It runs until the process ends."""
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self):
        while True:
            # If a request fails from here on, the wait below ends at once, and the watch looks
            # again.
            self._request_has_failed.clear()
            try:
                self.look()
            except BaseException:  # whatever it was: without the watch an outage never ends
                app.app.logger.exception("The watch of Redis failed, and goes on")
            self._request_has_failed.wait(PAUSE_SECONDS)

    def look(self):
        """Tell the log how things are, then ask Redis, and begin or end an outage."""
        outage = self.outage
        # First the log: the question below may find Redis well again, and end the outage before
        # anybody has told of it.
        self._log.tell(outage)
        if outage is None:
            self._look_in_good_times()
        else:
            self._look_in_an_outage(outage)

    def _look_in_good_times(self):
        """Begin an outage if Redis does not answer a PING. A PING writes nothing to the disk."""
        _, failure = app.ask_redis_now(app.ping)
        if failure:
            self._set_outage(failure)

    def _look_in_an_outage(self, outage):
        """End the outage if Redis can count. A PING would not tell, because it writes nothing."""
        close_idle_connections()
        _, failure = app.ask_redis_now(count_nothing)
        if failure:
            self._set_outage(failure)
        else:
            self._end_outage(outage)


def count_nothing(client):
    """A question like app.count_hit that adds 0 instead of 1: redis-py sends INCRBY for both.

    It fails when hits fail: on a replica, without memory, without permission, or while a CLIENT
    PAUSE holds writes back. It is only asked in an outage, because Redis writes it to the disk.
    """
    return app.check_count(client.incrby(app.HITS_KEY, 0))


def close_idle_connections():
    """Close the client's connections that are not in use.

    The next question then opens a connection, and looks up the name of Redis for that: it may
    have another address now.
    """
    client = app.get_redis_client()  # never None here: serve.py starts no watch without a client
    client.connection_pool.disconnect(inuse_connections=False)


class OutageLog:
    """Writes to the log when an outage has begun, when its kind has changed, and when it is over.

    The watch calls `tell` at every look. If a change comes within QUIET_SECONDS of the last line,
    nothing is written. The first call after that time writes it, if nothing has changed back.
    """

    def __init__(self):
        # The kind of failure in the last line. None: the last line said that Redis is back, or
        # there has been no line yet.
        self._told_kind = None
        self._quiet_until = 0.0  # in seconds of time.monotonic()

    def tell(self, outage):
        """Write a line if `outage` differs from what the last line told."""
        kind = outage.kind if outage else None
        if kind == self._told_kind or time.monotonic() < self._quiet_until:
            return
        if outage:
            app.app.logger.warning("Redis failed, hits are not counted: %s", outage.reason)
        else:
            app.app.logger.warning("Redis is back, hits are counted again")
        self._told_kind = kind
        self._quiet_until = time.monotonic() + QUIET_SECONDS
