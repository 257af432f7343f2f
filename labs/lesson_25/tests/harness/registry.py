"""A registry of the tests, which requires a login for everything, as a private package does."""

import contextlib
import json
import os
import pathlib
import re
import secrets

from harness.engine import container, docker

# `htpasswd -Bbn tester tester`: the registry supports no other kind of account
ACCOUNTS = "tester:$2y$05$t127/IZ7CdRfb/YURTzcnOX/lBR/RI6sqMoJdKbBCCUX7p7WvOKWC\n"


class Registry:
    """A running registry. `logged_in` is the environment of a docker command that can use it."""

    user = password = "tester"

    def __init__(self, container, folder):
        self.container = container.name
        self.address = f"127.0.0.1:{container.port}"
        self.account = ["--username", self.user, "--password", self.password]
        self.folder = folder
        self.logged_in = self.logged_out()

    def logged_out(self):
        """Return a new environment of a docker command, with this user's settings and no login."""
        own = pathlib.Path(os.environ.get("DOCKER_CONFIG") or pathlib.Path.home() / ".docker")
        config = self.folder / secrets.token_hex(4)
        config.mkdir()
        for entry in own.glob("*"):
            if entry.name != "config.json":
                (config / entry.name).symlink_to(entry)
        file = own / "config.json"
        settings = json.loads(file.read_text()) if file.exists() else {}
        # Without any login, docker would use the system's credential store.
        auths = {"lab25.invalid": {}}
        settings |= {"credsStore": "", "credHelpers": {}, "auths": auths}
        (config / "config.json").write_text(json.dumps(settings))
        return {**os.environ, "DOCKER_CONFIG": str(config)}

    def name(self, owner, tag):
        return f"{self.address}/{owner}/lab25-web:{tag}"

    def push(self, image, name):
        """Push `image` as `name`, remove this name here, and return the digest."""
        docker("tag", image, name)
        output = docker("push", name, env=self.logged_in).stdout
        docker("image", "rm", name)
        return re.search(r"digest: (\S+)", output)[1]


@contextlib.contextmanager
def private_registry(folder):
    """Yield a Registry on a free port of loopback, with its files in `folder`."""
    accounts = folder / "htpasswd"
    accounts.write_text(ACCOUNTS)
    options = [
        "--env=REGISTRY_AUTH=htpasswd",
        "--env=REGISTRY_AUTH_HTPASSWD_REALM=tests",
        "--env=REGISTRY_AUTH_HTPASSWD_PATH=/htpasswd",
        f"--volume={accounts}:/htpasswd:ro",
    ]
    with container("registry:2", *options, port_inside=5000, wait=False) as made:
        running = Registry(made, folder)
        login = ["login", running.address, *running.account]
        made.wait_for(lambda: docker(*login, env=running.logged_in, check=False).returncode == 0)
        yield running
