"""What stands at Redis' address and is none, or a Redis that can be held up."""

import contextlib
import socketserver

import fakeredis

from harness.clients import serving
from harness.limits import PATIENCE_SECONDS


@contextlib.contextmanager
def peer(answer):
    """Yield the port of a server that says what `answer(said)` returns; it hangs up for None.

    It also hangs up after PATIENCE_SECONDS without a word, so that nobody waits for it for ever.
    """

    def handle(connection, *_):
        connection.settimeout(PATIENCE_SECONDS)
        with contextlib.suppress(TimeoutError):
            while said := connection.recv(4096):
                speech = answer(said)
                if speech is None:
                    return
                connection.sendall(speech)

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), handle)) as port:
        yield port


def counting_by(answer_hit):
    """Return an answer for `peer`: `answer_hit()` to a hit, and a PONG to anything else."""

    def answer(said):
        if b"INCRBY" in said:
            return answer_hit()
        return b"+PONG\r\n"

    return answer


class FakeRedisServer(fakeredis.TcpFakeServer):
    """A stand-in for Redis on a port of its own."""

    request_queue_size = 64  # fakeredis' own 5 would drop connections that are made at once

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), server_type="redis")
