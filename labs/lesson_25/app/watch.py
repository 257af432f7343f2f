"""What finds out that Redis went, and that it is back: one thread of each worker process.

Requests ask Redis only while hits can be counted, as far as is known. The first request that
fails waits for Redis, and tells all others by Watch.outage, which are then answered at once.
From then on the thread here asks, and no request does, until it has seen that hits are counted.
"""

import threading
import time

import app

# Between two questions. With a wait for Redis on top it stays under the two seconds that are
# promised between the return of Redis and the next counted hit.
PAUSE_SECONDS = 0.5

# Between two lines in the log: a Redis that fails and answers in turns must not fill it.
QUIET_SECONDS = 3


class Watch:
    """The circuit breaker of one worker.

    `outage` is its state, the only one that requests read: the reason why hits are not counted,
    or None while they are. A request that fails begins an outage (report_failure). The thread
    here begins one too, where its own question fails, and it alone ends one (look).

    No lock is taken. At worst a request fails late, just after an outage has ended, and begins
    it again: the thread then asks at once and ends it, after the milliseconds that this takes.
    """

    def __init__(self):
        self.outage = None
        self._log = OutageLog()
        self._request_failed = threading.Event()

    def start(self):
        """Begin to look, in a thread that ends with the process."""
        threading.Thread(target=self._keep_looking, name="watch", daemon=True).start()

    def report_failure(self, reason):
        """Tell every other request why hits are not counted, and have the thread look at once."""
        self.outage = reason
        self._request_failed.set()

    def _keep_looking(self):
        while True:
            self.look()
            self._request_failed.wait(PAUSE_SECONDS)
            self._request_failed.clear()

    def look(self):
        """Ask Redis one question, begin or end an outage, and tell the log. Never raises."""
        try:
            outage = self.outage
            self._log.tell(outage)  # already here: the question may not meet what a hit has met
            failure = ask_for_a_failure(outage)
            if failure:
                self.outage = failure
            elif outage and self.outage is outage:  # otherwise a hit has failed since: ask again
                self.outage = None
            self._log.tell(self.outage)
        except BaseException as error:  # whatever it was, an outage must not outlive it
            self.outage = f"{type(error).__name__}: {error}"


def ask_for_a_failure(outage):
    """Ask Redis whether hits can be counted; return the reason why not, or None.

    In an outage the question is a hit that counts nothing, since a Redis may answer a PING and
    yet refuse hits or hold them back. It is not asked in good times, for each writes to a disk.
    """
    if outage is None:
        question = app.ping
    else:
        question = count_nothing
        close_idle_connections()
    _, failure = app.ask_redis_now(question)
    return failure


def count_nothing(client):
    """A question like app.count_hit: it fails wherever a hit fails, and counts nothing."""
    return app.must_be_a_number(client.incrby(app.HITS_KEY, 0))


def close_idle_connections():
    """Have the next question make a new connection: the name may lead to another Redis now."""
    client = app.get_redis_client()
    client.connection_pool.disconnect(inuse_connections=False)


class OutageLog:
    """Tells the log what has changed. Only the watch's thread uses it."""

    def __init__(self):
        self._told_kind = None  # of the failure that the last line told; None after "is back"
        self._untold = None  # the latest failure of another kind, until a line has told it
        self._silent_until = 0.0  # in seconds of time.monotonic()

    def tell(self, outage):
        """Write at most one line; what may not be written yet is written by a later call."""
        if outage and kind_of(outage) != self._told_kind:
            self._untold = outage
        if time.monotonic() < self._silent_until:
            return
        if self._untold:
            app.app.logger.warning("Redis failed, hits are not counted: %s", self._untold)
            self._told_kind = kind_of(self._untold)
            self._untold = None
        elif self._told_kind and outage is None:
            app.app.logger.warning("Redis is back, hits are counted again")
            self._told_kind = None
        else:
            return
        self._silent_until = time.monotonic() + QUIET_SECONDS


def kind_of(reason):
    """Return the name of the error's class, with which every reason begins."""
    return reason.partition(":")[0]
