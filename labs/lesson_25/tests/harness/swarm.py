"""What the tests of a swarm share: engines in containers, and what the kernel lacks for Swarm."""

import contextlib
import http.client
import http.server
import re

import yaml

from harness import PROJECT
from harness.clients import FAILURES, eventually, serving
from harness.engine import container, docker

STACK_FILE = PROJECT / "compose" / "docker-stack.yml"

# Requests IPVS and an association with ESP from the kernel by netlink, which loads their modules.
# Prints which of them the kernel lacks.
KERNEL = """
import socket, struct
def lacks(protocol, message):
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    kernel.send(struct.pack("=IHHII", 16 + len(message), 16, 5, 0, 0) + message)
    kind, error = struct.unpack_from("=H10xi", kernel.recv(4096), 4)
    return kind == 2 and error != 0
layout = "=56x16s2xBxB3x16s32s84xHBBB7xHH64sI16x"
here, all_bits = bytes([127, 0, 0, 1]), b"\\xff" * 32
association = struct.pack(
    layout, here, 1, 50, here, all_bits, 2, 0, 0, 0, 88, 2, b"cbc(aes)", 128)
print("IPVS" * lacks(16, struct.pack("=BBHHH8s", 3, 1, 0, 9, 2, b"IPVS")))
print("ESP" * lacks(6, association))
"""


def kernel_lacks(image):
    """Return which of IPVS and ESP, both of which Swarm needs, this kernel lacks."""
    options = ["--rm", "--user=0", "--cap-add=NET_ADMIN"]
    return docker("run", *options, image, "python", "-c", KERNEL).stdout.split()


def adapted(stack, lacks, **port):
    """Return the text of a stack file for a kernel that `lacks` something.

    Without IPVS no routing mesh works, so each task publishes its own port, with the keys `port`.
    Without ESP an encrypted network carries nothing between nodes, so it is not encrypted.
    """
    if not lacks:
        return stack
    file = yaml.safe_load(stack)
    if "IPVS" in lacks:
        file["services"]["web"]["ports"] = [{"target": 8080, "mode": "host", **port}]
    if "ESP" in lacks:
        del file["networks"]["backend"]["driver_opts"]["encrypted"]
    return yaml.safe_dump(file, sort_keys=False)


@contextlib.contextmanager
def engines(count, network, registry, *options):
    """Yield the Containers of engines in a network of their own, with `registry` as registry:5000.

    They use that registry without TLS, and are removed with the network.
    """
    options = ["--privileged", "--network", network, *options]
    dockerd = ["dockerd", "--insecure-registry", "registry:5000"]
    with contextlib.ExitStack() as cleanup:
        docker("network", "create", network)
        cleanup.callback(docker, "network", "rm", network)
        docker("network", "connect", "--alias", "registry", network, registry.container)
        cleanup.callback(docker, "network", "disconnect", network, registry.container)
        nodes = [
            cleanup.enter_context(
                container("docker:28-dind", *options, command=dockerd, wait=False)
            )
            for _ in range(count)
        ]
        for node in nodes:
            wait_for_engine(node)
        yield nodes


def wait_for_engine(node):
    """Wait until the engine in the container `node` answers."""
    eventually(lambda: node.run("docker", "info", check=False).returncode == 0, 60)


@contextlib.contextmanager
def mesh(node, port):
    """Replace Swarm's routing mesh: pass each GET on `port` to the first task that accepts it."""
    (network,) = node.inspect()["NetworkSettings"]["Networks"].values()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            published = node.run("docker", "ps", "--format", "{{.Ports}}").stdout
            for task_port in re.findall(r"0\.0\.0\.0:(\d+)->8080", published):
                task = http.client.HTTPConnection(network["IPAddress"], int(task_port), timeout=5)
                with contextlib.suppress(*FAILURES), contextlib.closing(task):
                    task.request("GET", self.path, headers={"Host": self.headers["Host"]})
                    answer = task.getresponse()
                    self.send_response(answer.status)
                    self.end_headers()
                    self.wfile.write(answer.read())
                    return

        def log_message(self, *_):
            """Log nothing."""

    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)):
        yield
