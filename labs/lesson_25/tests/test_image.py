"""The image: who it runs as, what it holds and what it leaves out, what a change costs, how it starts and stops."""

import json
import re
import subprocess
import urllib.parse

import pytest

from conftest import BUILD_DATE, BUILD_VERSION
from harness.clients import counted, eventually, timed
from harness.engine import (
    BASE,
    CONTEXT,
    base_lines,
    build,
    bytes_over_base,
    container,
    docker,
    inspect,
    layer_sizes,
    redis_in,
)
from harness.limits import LAYERS_OVER_BASE_BYTES, PUSHED_AGAIN_BYTES, STOP_SECONDS

pytestmark = pytest.mark.engine

# Prints, as JSON, every path of the container that a build tool or a cache would have.
FIND_LEFTOVERS = r"""
import importlib.util, json, os, re, shutil
tools = "pip pip3 gcc cc g++ c++ clang cpp ld as make cmake curl wget git uv poetry cargo rustc".split()
found = [tool for tool in tools if shutil.which(tool)]
modules = "pip", "ensurepip", "setuptools", "wheel", "pytest", "fakeredis"
found += ["import " + name for name in modules if importlib.util.find_spec(name)]
left = re.compile(r"^pip-.*whl$|^requirements.*txt$|^Dockerfile$|^\.git|^test_.*\.py$|^\.env")
own = "/var/lib/apt/lists", "/var/cache/apt/archives", "/root/.cache", "/install", "/tmp", "/app"
for where, folders, files in os.walk("/"):
    if where == "/":
        folders[:] = [folder for folder in folders if folder not in ("proc", "sys", "dev")]
    found += [os.path.join(where, file) for file in files
              if left.search(file) or (where.startswith(own) and file not in ("lock", "app.py", "serve.py"))]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def web(image):
    """A container of the image, without Redis; shared, so that tests leave it as it is."""
    with container(image) as made:
        yield made


def layers(image):
    return inspect(image, "image")["RootFS"]["Layers"]


# Who and what


def test_runs_as_appuser_with_no_shell_and_no_home(image, web):
    """By its number, so that a cluster can see that it is not root."""
    assert inspect(image, "image")["Config"]["User"] == "10001"
    program = "import os, pwd; u = pwd.getpwuid(os.getuid()); print(u.pw_name, u.pw_shell, os.path.exists(u.pw_dir))"
    assert web.python(program) == "appuser /usr/sbin/nologin False\n"
    assert (
        web.python("import os; print(os.getuid(), os.geteuid(), os.getgid() != 0)")
        == "10001 10001 True\n"
    )
    program = "import os; print([p for p in ('/app', '/app/app.py', '/usr/local/lib') if os.access(p, os.W_OK)])"
    assert web.python(program) == "[]\n", "it can change its own program"


def test_runs_read_only_without_capabilities_and_as_any_user(image):
    options = [
        "--read-only",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--user",
        "1234567:0",
    ]
    with container(image, *options) as made:
        assert made.get().status == 200


def test_holds_no_build_tool_cache_or_test(web):  # nor the build's own files
    in_base = json.loads(docker("run", "--rm", BASE, "python", "-c", FIND_LEFTOVERS).stdout)
    assert {"pip", "import pip", "import ensurepip"} <= set(in_base), (
        "what looks for leftovers does not find them"
    )
    assert json.loads(web.python(FIND_LEFTOVERS)) == []


def test_holds_the_locked_packages_and_no_other(web):
    locked = dict(
        re.findall(r"^([a-z0-9-]+)==([^ ]+) \\$", (CONTEXT / "requirements.txt").read_text(), re.M)
    )
    program = "import importlib.metadata as m; print(*(f'{d.name.lower()}=={d.version}' for d in m.distributions()))"
    assert dict(package.split("==") for package in web.python(program).split()) == locked


def test_a_build_takes_in_only_what_it_needs(context, tmp_path):
    (context / ".env").write_text("TOKEN=secret")
    (context / "large.bin").write_bytes(bytes(1_000_000))
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM scratch\nCOPY . /\n")
    docker("build", "--file", dockerfile, "--output", tmp_path / "context", context)
    assert {path.name for path in (tmp_path / "context").iterdir()} == {
        "app.py",
        "requirements.txt",
        "serve.py",
    }


def test_labels_and_health_tell_the_build(image, web):
    config = inspect(image, "image")["Config"]
    labels = {"maintainer": "vlrrbn", "service": "lab25-web", "env": "lab"}
    oci = {"title": "lab25-web", "version": BUILD_VERSION, "created": BUILD_DATE}
    assert config["Labels"] == labels | {
        f"org.opencontainers.image.{name}": value for name, value in oci.items()
    }
    assert set(config["ExposedPorts"]) == {"8080/tcp"}
    answer = web.get("/health").json
    assert (answer["version"], answer["build_date"], answer["env"]) == (
        BUILD_VERSION,
        BUILD_DATE,
        "lab",
    )


def test_the_builder_builds_alone():
    builder = build("builder", "--target", "builder")
    assert inspect(builder, "image")["Config"]["Labels"]["stage"] == "builder"
    docker("run", "--rm", builder, "test", "-x", "/install/bin/flask")


def test_stays_below_its_limit_over_the_base(image):
    assert bytes_over_base(image) < LAYERS_OVER_BASE_BYTES


def test_the_history_shows_what_came_from_the_builder(image):
    """One line for the packages, none for what made them; the app above it, version and date on top."""
    lines = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout.splitlines()
    made_here = lines[: -base_lines()]
    (packages,) = [
        place for place, line in enumerate(made_here) if "COPY /install /usr/local" in line
    ]
    (app,) = [place for place, line in enumerate(made_here) if "app.py serve.py ./" in line]
    (version,) = [
        place for place, line in enumerate(made_here) if line.startswith("ENV BUILD_VERSION")
    ]
    assert version < app < packages
    assert not [line for line in made_here if "pip install" in line]


# What a change costs


def test_a_change_of_the_app_makes_one_small_new_layer(image, context):
    (context / "app.py").chmod(0o600)
    with (context / "app.py").open("a") as file:
        file.write("# changed\n")
    changed = build("changed", context=context)
    assert layers(changed)[:-1] == layers(image)[:-1]
    assert layers(changed)[-1] != layers(image)[-1]
    assert max(layer_sizes(changed)[:5]) < PUSHED_AGAIN_BYTES
    with container(changed) as made:  # though only its owner may read the file here
        assert made.get().status == 200


def test_a_new_version_makes_no_new_layer(image):
    other = build("other", "--build-arg", "BUILD_VERSION=other")
    assert layers(other) == layers(image)
    assert (
        inspect(other, "image")["Config"]["Labels"]["org.opencontainers.image.version"] == "other"
    )


# Health, and the end


@pytest.mark.parametrize(
    "settings", [["PORT=9090"], ["HOST=", "PORT="], ["HOST=localhost"], ["HOST=::", "PORT=80"]]
)
def test_the_health_check_follows_host_and_port(image, settings):
    options = [f"--env={setting}" for setting in settings]
    with container(image, *options, wait=False) as made:
        docker("start", made.name)
        eventually(lambda: made.health == "healthy", 15)


@pytest.mark.parametrize(
    ("option", "program"),
    [
        ("-m", "http.server"),
        ("-c", "import socket, time; s = socket.create_server(('', 8000)); time.sleep(99)"),
    ],
)
def test_the_health_check_fails_when_health_does(image, option, program):
    """In place of the app, something that knows no /health, or that takes connections and never answers."""
    options = ["--env=PORT=8000", "--health-interval=200ms", "--health-start-period=1ms", "--init"]
    with container(image, *options, wait=False, command=["python", option, program]) as made:
        docker("start", made.name)
        eventually(lambda: made.health == "unhealthy", 20)


@pytest.mark.timing
def test_stops_at_once_when_idle(image):
    with container(image) as made:
        assert timed(docker, "stop", made.name) < STOP_SECONDS
        assert made.inspect()["State"]["ExitCode"] == 0


# Signals process 1 a moment after it can first hear that: before, the kernel drops it.
SIGNAL_EARLY = """
import os, re, sys, time
while not int(re.search("SigCgt:(.*)", open("/proc/1/status").read())[1], 16) >> 14 & 1:
    time.sleep(0.005)
time.sleep(float(sys.argv[1]))
os.kill(1, 15)
"""


def test_stops_with_status_0_also_while_it_is_still_starting(image):
    with container(image, wait=False) as made:
        for hundredths in range(0, 60, 5):
            docker("start", made.name)
            made.run(
                "python", "-c", SIGNAL_EARLY, hundredths / 100, check=False
            )  # what ends takes this along
            assert (
                docker("wait", made.name, timeout=4).stdout == "0\n"
            )  # a deaf worker is killed after five seconds


# A Redis that wants a password, or TLS


def test_counts_in_a_redis_that_wants_a_password_and_says_why_where_it_is_wrong(
    image, network, tmp_path
):
    password = """a b'c"d\\e$f/g?h#i@j%k"""
    (tmp_path / "password").write_text(password + "\n")
    mounted, in_url = (
        f"--volume={tmp_path}/password:/password:ro",
        urllib.parse.quote(password, safe=""),
    )
    addresses = [
        [mounted, "--env=REDIS_HOST=redis", "--env=REDIS_PASSWORD_FILE=/password"],
        ["--env=REDIS_HOST=redis", f"--env=REDIS_PASSWORD={password}"],
        [f"--env=REDIS_URL=redis://default:{in_url}@redis:6379/0"],
    ]
    with redis_in(network, "--network-alias", "redis") as redis:
        redis.run("redis-cli", "config", "set", "requirepass", password)
        for number, options in enumerate(addresses, start=1):
            with container(image, "--network", network, *options) as web:
                assert web.get().json["hit_count"] == number
                assert password not in web.log() and in_url not in web.log()
        with container(
            image, "--network", network, "--env", "REDIS_HOST=redis", "--env", "REDIS_PASSWORD=no"
        ) as web:
            answer = web.get()
            assert (answer.status, answer.json["hit_count"]) == (200, None)
            assert "invalid username-password pair" in answer.json["redis_error"]
            assert web.get("/health").json["redis_ok"] is False


def test_counts_in_a_redis_with_tls_that_shows_a_certificate_of_the_given_authority(
    image, network, tmp_path
):
    subject = ["-subj", "/CN=redis", "-addext", "subjectAltName=DNS:redis", "-days", "2", "-nodes"]
    for name in ("redis", "other"):
        files = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt"]
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, *files]
        subprocess.run(command, check=True, capture_output=True)
        (tmp_path / f"{name}.key").chmod(0o644)
    tmp_path.chmod(0o755)
    mounted = ["--network", network, "--volume", f"{tmp_path}:/tls:ro"]
    files = "--tls-cert-file /tls/redis.crt --tls-key-file /tls/redis.key --tls-ca-cert-file /tls/redis.crt"
    command = f"redis-server --port 0 --tls-port 6379 --tls-auth-clients no {files}".split()
    with container(
        "redis:7-alpine", *mounted, "--network-alias", "redis", wait=False, command=command
    ) as redis:
        docker("start", redis.name)
        with container(
            image, *mounted, "--env", "REDIS_URL=rediss://redis?ssl_ca_certs=/tls/redis.crt"
        ) as web:
            assert eventually(lambda: counted(web.get())) == 1
        for url in ("rediss://redis?ssl_ca_certs=/tls/other.crt", "rediss://redis"):
            with container(image, *mounted, "--env", f"REDIS_URL={url}") as web:
                assert "certificate verify failed" in web.get().json["redis_error"]
