"""Stand-ins for Redis, with replies that a test chooses."""

import contextlib
import socketserver
import ssl
import subprocess

from harness.clients import serving
from harness.limits import PATIENCE_SECONDS


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True  # its port may have had another server, with open connections
    request_queue_size = 64


@contextlib.contextmanager
def peer(reply_to, port=0, tls=None):
    """Yield the port of a server that sends `reply_to(request)`, or hangs up if that is None.

    After the `with` block it accepts no connection, but still answers on those that are open. With
    an SSLContext as `tls`, it speaks TLS.
    """

    def handle(connection, *_):
        connection.settimeout(PATIENCE_SECONDS)
        with contextlib.suppress(OSError):  # the client is gone, or rejected the certificate
            if tls:
                connection = tls.wrap_socket(connection, server_side=True)
            with connection:
                while request := connection.recv(4096):
                    reply = reply_to(request)
                    if reply is None:
                        return
                    connection.sendall(reply)

    with serving(Server(("127.0.0.1", port), handle)) as listening_port:
        yield listening_port


def patient_url(port):
    """Return the REDIS_URL of a peer, with a long limit: a busy machine delays a reply."""
    return f"redis://127.0.0.1:{port}?socket_timeout=20"


def self_signed(folder):
    """Return a new certificate for 127.0.0.1, as a file, and the SSLContext of its server."""
    command = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
    command += " -subj /CN=redis -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return folder / "cert.pem", context
