"""What tests of a swarm share: engines in containers, and what the stack needs of the kernel."""

import contextlib
import http.client
import http.server
import re

import yaml

from harness import PROJECT
from harness.clients import FAILURES, eventually, serving
from harness.engine import container, docker

STACK_FILE = PROJECT / "compose" / "docker-stack.yml"

# Asks the kernel by netlink for IPVS and for an association with ESP, which loads their modules.
# Prints what it lacks.
KERNEL = """import socket, struct
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
    """Return the names of what Swarm needs and this kernel has not, of IPVS and ESP."""
    options = ["--rm", "--user=0", "--cap-add=NET_ADMIN"]
    return docker("run", *options, image, "python", "-c", KERNEL).stdout.split()


def adapted(stack, lacks, **port):
    """Return the text of a stack file for a kernel that `lacks` something.

    Without IPVS there is no mesh: the web's port is then each task's own, with `port` as its form.
    Without ESP nothing would pass from node to node: the network is then not encrypted.
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
def engine_in_container(*options, command=()):
    """Yield the Container of an engine of its own, which has started and answers."""
    image = "docker:28-dind"
    with container(image, "--privileged", *options, command=command, wait=False) as node:
        docker("start", node.name)
        eventually(lambda: node.run("docker", "info", check=False).returncode == 0, 60)
        yield node


@contextlib.contextmanager
def mesh(node, port):
    """Listen on `port` in place of Swarm's mesh: hand each GET to the first task that takes it."""
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
            """Say nothing."""

    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)):
        yield
