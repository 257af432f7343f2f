"""The circuit breaker: it keeps requests from waiting for a Redis that does not count.

While all is well, requests ask Redis. When one of them fails, an outage begins: requests are then
answered at once, without asking. A thread, the watch, asks instead. When it sees that hits can be
counted, the outage ends. Every worker process has one breaker and one watch, started by serve.py.
"""

import threading
import time

import app

# The time between two questions of the watch. The README promises that hits are counted again
# within 2 s after Redis is back. Up to 0.5 s of that may pass with a question that was asked just
# before, and 0.5 s with this pause. 1 s is left for the next question, on a new connection.
PAUSE_SECONDS = 0.5

# A worker writes at most one line in this time, even if Redis fails and answers by turns.
QUIET_SECONDS = 3


class CircuitBreaker:
    """Whether requests may ask Redis, and if not, why.

    `outage` is the latest app.Failure in an outage, or None while hits are counted. Requests
    read it. A failed request begins an outage, and so does the watch. Only the watch ends one.

    What two threads can do to one another: a request may still be waiting for Redis when an outage
    ends, and fail after that. It then begins a new outage, though Redis is well. The watch ends it
    some milliseconds later. Meanwhile hits are answered, but not counted.
    """

    def __init__(self):
        self.outage = None
        # Whoever changes self.outage holds this lock, because _end_outage has to compare and change
        # it in one step. Nobody holds it while asking Redis or writing to the log.
        self._lock = threading.Lock()
        self._look_at_once = threading.Event()
        self._log = OutageLog()

    def begin_outage(self, failure):
        """Begin an outage, and have the watch look at once. A request that fails calls this."""
        self._set_outage(failure)
        self._look_at_once.set()

    def _set_outage(self, failure):
        with self._lock:
            self.outage = failure

    def _end_outage(self, outage):
        """End the outage that the watch has read, unless a request has failed since then.

        That can be a request that has been waiting since before the outage. Its Failure is in
        self.outage now. It may be equal to `outage`, but it is another object: so the comparison
        is `is`, not `==`.
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
            try:
                self.look()
            except BaseException:  # whatever it was: without the watch an outage never ends
                app.app.logger.exception("The watch of Redis failed, and goes on")
            # Pause, but only until an outage begins. The event is cleared before the next look, not
            # after it, so that none is missed.
            self._look_at_once.wait(PAUSE_SECONDS)
            self._look_at_once.clear()

    def look(self):
        """Tell the log of a change since the last look, ask Redis, and begin or end an outage."""
        outage = self.outage
        self._log.tell(outage)  # before the question, which may end the outage
        if outage is None:
            self._look_in_good_times()
        else:
            self._look_in_an_outage(outage)

    def _look_in_good_times(self):
        """Begin an outage if Redis does not answer a PING."""
        _, failure = app.ask_redis_now(app.ping)
        if failure:
            self.begin_outage(failure)

    def _look_in_an_outage(self, outage):
        """End the outage if Redis can count again."""
        _, failure = app.ask_redis_now(count_nothing)
        if failure:
            self._set_outage(failure)
        else:
            self._end_outage(outage)


def count_nothing(client):
    """The question in an outage: a hit that adds 0. redis-py sends INCRBY for this and for a hit.

    It fails when hits fail. A PING may be answered although hits fail: by a replica, without
    memory, without permission, or while a CLIENT PAUSE holds writes back. But Redis writes every
    INCRBY to the disk, so in good times a PING is better.
    """
    # Redis may have another address now. With its connections closed, redis-py opens a new one for
    # the question, and looks up the name of Redis for that. (As long as hits are counted at the
    # old address, nobody looks for a new one.)
    client.connection_pool.disconnect(inuse_connections=False)
    return app.check_count(client.incrby(app.HITS_KEY, 0))


class OutageLog:
    """Writes to the log when an outage has begun, when its kind has changed, and when it is over.

    The watch calls `tell` at every look. For QUIET_SECONDS after a line nothing is written. So an
    outage that comes and goes in this time is never told.
    """

    def __init__(self):
        # What a reader of the log believes: the kind of the outage, or None for "all is well".
        self._told_kind = None
        self._quiet_until = 0.0  # in seconds of time.monotonic()

    def tell(self, outage):
        """Write a line if `outage`, a Failure or None, is not what a reader of the log believes."""
        kind = outage.kind if outage else None
        if kind == self._told_kind or time.monotonic() < self._quiet_until:
            return
        if outage:
            app.app.logger.warning("Redis failed, hits are not counted: %s", outage.reason)
        else:
            app.app.logger.warning("Redis is back, hits are counted again")
        self._told_kind = kind
        self._quiet_until = time.monotonic() + QUIET_SECONDS
