"""The image: its stages, contents, user, rebuilds, labels, startup, health check and exit."""

import datetime
import json
import re
import shutil
import time

import pytest

from conftest import BUILD_DATE, BUILD_VERSION
from harness.engine import BASE, RUN, base_lines, build, container, docker, inspect
from harness.limits import CHANGED_APP_BYTES, LAYERS_OVER_BASE_BYTES

pytestmark = pytest.mark.engine
step = pytest.mark.step  # lesson only: see harness/judge.py

MEGABYTE = 1_000_000


def run_python(image, program, *options):
    """Return the JSON that a Python program prints in a new container."""
    command = ["run", "--rm", "--entrypoint", "python", *options, image, "-Bc", program]
    return json.loads(docker(*command).stdout)


def history(image):
    """Return (bytes, time, command) of each step over the base image, the newest first."""
    columns = "{{.Size}}\t{{.CreatedAt}}\t{{.CreatedBy}}"
    command = ["history", "--human=false", "--no-trunc", "--format", columns, image]
    lines = docker(*command).stdout.splitlines()[: -base_lines()]
    steps = [line.split("\t", maxsplit=2) for line in lines]
    return [(int(size), parse_time(made), command) for size, made, command in steps]


def parse_time(text):
    return datetime.datetime.fromisoformat(text)


@step(1, 2, 3, 4, 5, 6)
def test_starts_and_answers(image):
    """A container starts, and answers requests from outside with status 200."""
    with container(image, wait=False) as web:
        unreachable = "nothing outside the container can reach its port 8080"
        answer = web.wait_for(lambda: web.get("/health"), 15, broken=unreachable)
        assert answer.status == 200, f"/health returned status {answer.status}"


@pytest.fixture(scope="module")
def builder(app_folder):
    """The stage `builder` as an image."""
    return build("builder", "--target", "builder", context=app_folder)


@step(1)
def test_stages_build_separately(app_folder, builder):
    """The stages builder and runtime can be built, and builder has the packages in /install."""
    build("runtime", "--target", "runtime", context=app_folder)
    listing = docker("run", "--rm", "--entrypoint", "ls", builder, "/install/bin", check=False)
    assert "flask" in listing.stdout.split(), "the stage 'builder' has no /install/bin/flask"


# The contents

# Prints, by kind, what is in the container although only a build needs it.
SEARCH = r"""
import importlib.util, json, os, re, shutil
tools = "gcc cc g++ c++ clang cpp ld as make cmake curl wget git uv poetry cargo rustc".split()
caches = "/var/lib/apt/lists", "/var/cache/apt/archives", "/root/.cache", "/install", "/tmp"
context = re.compile(r"requirements.*(txt|in)|Dockerfile.*|test_.*\.py|\.(dockerignore|git|env).*")
modules = ["pip", "ensurepip", "setuptools", "wheel"]
found = {
    "tools that only a build needs": [tool for tool in tools if shutil.which(tool)],
    "tools that install packages": [name for name in modules if importlib.util.find_spec(name)],
    "files that an installation left": [],
    "files that the running app never reads": [],
}
for folder, folders, names in os.walk("/"):
    if folder == "/":
        folders[:] = set(folders) - {"proc", "sys", "dev"}
    for name in names:
        path = os.path.join(folder, name)
        if re.match(r"pip[\d.]*$|pip-.*whl$", name):
            found["tools that install packages"].append(path)
        if folder.startswith(caches) and name != "lock":
            found["files that an installation left"].append(path)
        if context.fullmatch(name) or (folder.startswith("/app") and not name.endswith(".py")):
            found["files that the running app never reads"].append(path)
print(json.dumps(found))
"""
# Prints what the image's own user is, has and can change.
OWN_VIEW = """
import glob, importlib.metadata, json, os, pwd
paths = ["/app", *glob.glob("/app/*"), "/usr/local/lib", "/usr/local/bin"]
packages = importlib.metadata.distributions()
print(json.dumps({
    "users": {user.pw_name: [*user, os.path.exists(user.pw_dir)] for user in pwd.getpwall()},
    "gid": os.getgid(),
    "folder": os.getcwd(),
    "packages": [f"{package.name.lower()}=={package.version}" for package in packages],
    "writable": [path for path in paths if os.access(path, os.W_OK)],
}))
"""


@pytest.fixture(scope="module")
def own_view(image):
    """What the image's own user is, has and can change."""
    return run_python(image, OWN_VIEW)


@pytest.fixture(scope="module")
def contents(image, app_folder, own_view):
    """What is in the image and must not be, by kind."""
    requirements = (app_folder / "requirements.txt").read_text()
    locked = set(re.findall(r"^([a-z0-9-]+==\S+) \\$", requirements, re.M))
    commands = "\n".join(command for _, _, command in history(image))
    return {
        "steps that install packages": re.findall("(?:pip3? install|apt-get |apt ).*", commands),
        "steps that repeat the Python version": re.findall(r"\S*python-?3\.\d\S*", commands),
        "packages that differ from requirements.txt": locked ^ set(own_view["packages"]),
        "files that its own user can change": own_view["writable"],
        **run_python(image, SEARCH, "--user", "0"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("tools that only a build needs", marks=step(1)),
        pytest.param("steps that install packages", marks=step(1)),
        pytest.param("files that an installation left", marks=step(1)),
        pytest.param("files that the running app never reads", marks=step(2, 3)),
        pytest.param("tools that install packages", marks=step(4)),
        pytest.param("packages that differ from requirements.txt", marks=step(4)),
        pytest.param("files that its own user can change", marks=step(4)),
        pytest.param("steps that repeat the Python version", marks=step(4)),
    ],
)
def test_image_has_no(kind, contents):
    """The image has no {kind}."""
    found = sorted(contents[kind])
    assert not found, f"the image has {kind}: {', '.join(found[:4])}{', …' * (len(found) > 4)}"


def test_search_finds_pip_in_base_image():
    found = run_python(BASE, SEARCH, "--user", "0")["tools that install packages"]
    assert {"pip", "ensurepip"} <= set(found), "the search misses pip"


@step(1, 3, 4, 6)
def test_stays_below_size_limit(image):
    """The image adds less than 38 MB to its base image."""
    steps = [(size / MEGABYTE, command) for size, _, command in history(image)]
    total = sum(size for size, _ in steps)
    limit = LAYERS_OVER_BASE_BYTES / MEGABYTE
    large = [f"\n{size:.1f} MB: {command[:150]}" for size, command in steps if size > 0.1]
    message = f"it adds {total:.1f} MB, the limit is {limit:.0f}; later steps shrink no layer"
    assert total < limit, message + "".join(large)


@step(1, 3)
def test_starts_in_app_folder(own_view):
    """A container starts in /app, where the app is."""
    folder = own_view["folder"]
    message = f"it starts in {folder} instead of /app: a stage does not inherit WORKDIR"
    assert folder == "/app", message


# The user


@step(4)
def test_user_is_number(image):
    """USER is the number 10001: a cluster cannot tell whether a name belongs to root."""
    user = inspect(image, "image")["Config"]["User"].partition(":")[0]
    shown = f"{user!r}" if user else "none, so it runs as root"
    assert user == "10001", f"USER must be the number 10001, got {shown}"


@step(4)
def test_user_is_appuser_without_shell_and_home(own_view):
    """The user 10001 is appuser, without a shell, a home directory or root's group."""
    assert "appuser" in own_view["users"], "there is no user appuser"
    *_, number, _, _, home, shell, has_home = own_view["users"]["appuser"]
    assert number == 10001, f"appuser must have the number 10001, got {number}"
    assert shell.endswith(("nologin", "false")), f"appuser has the shell {shell}"
    assert not has_home, f"appuser has the home folder {home}"
    assert own_view["gid"] != 0, "the user is in root's group"


# Rebuilds


@pytest.fixture(scope="module")
def built_before(image):
    """A time after the image was built. Layers that later builds add are not older."""
    # A history has whole seconds of the clock of the engine's machine.
    now = parse_time(docker("info", "--format", "{{.SystemTime}}").stdout.strip())
    time.sleep(1 - now.microsecond / 1_000_000)
    return now.replace(microsecond=0) + datetime.timedelta(seconds=1)


def new_megabytes(image, since):
    """Return the unpacked size of all layers that were made at `since` or later."""
    # Layers of two images cannot be compared: if two builds have run the same step, the cache may
    # return either result.
    return sum(size for size, made, _ in history(image) if made >= since) / MEGABYTE


@pytest.fixture(scope="module")
def changed(built_before, app_folder, tmp_path_factory):
    """An image of an app.py that prints a line at each request, from files with mode 600."""
    folder = tmp_path_factory.mktemp("changed") / "app"
    shutil.copytree(app_folder, folder)
    with (folder / "app.py").open("a") as file:
        file.write(f"app.before_request(lambda: print('printed by {RUN}'))\n")
    for path in folder.glob("*.py"):
        path.chmod(0o600)
    return build("changed", context=folder)


@step(3, 4)
def test_changed_app_adds_one_small_layer(changed, built_before):
    """A change to app.py adds less than 100 kB, and no package is installed again."""
    size = new_megabytes(changed, since=built_before)
    assert size, "the change to app.py is not in the image"
    assert size * MEGABYTE < CHANGED_APP_BYTES, (
        f"a change to app.py makes {size:.1f} MB of new layers: each layer after a changed one is"
        " made again, and a large one comes after the app"
    )


@step(6)
def test_new_version_adds_no_layer(image, built_before, app_folder):
    """A new BUILD_VERSION adds no layer."""
    other = build("other", "--build-arg", f"BUILD_VERSION={RUN}", context=app_folder)
    size = new_megabytes(other, since=built_before)
    assert not size, (
        f"each new version makes {size:.1f} MB of new layers: a step that adds a layer comes after"
        " the first use of BUILD_VERSION"
    )


@pytest.fixture(scope="module")
def changed_web(changed):
    """A container of the changed image, which may fail to start."""
    with container(changed, wait=False) as web:
        yield web


@step(4)
def test_runs_from_files_that_only_owner_can_read(changed_web):
    """The image's user can read the app, even if only its owner can read the source files."""
    unreadable = "it does not answer if only their owner can read the app's files"
    changed_web.wait_for(lambda: changed_web.get("/health"), broken=unreadable)


@step(5)
def test_print_reaches_log_at_once(changed_web):
    """A line that a route prints is in the log at once."""
    changed_web.wait_for(
        lambda: changed_web.get() and f"printed by {RUN}" in changed_web.log(),
        seconds=10,
        broken="the log lacks a line that a route prints: Python may keep it in a buffer",
    )


# What a build takes in


@step(2)
def test_build_context_has_only_needed_files(context, tmp_path):
    """The build context has the app's .py files and requirements.txt, and nothing else."""
    needed = {path.name for path in context.glob("*.py")} | {"requirements.txt"}
    for name in (".env", "notes.txt", "test_app.txt"):
        (context / name).touch()
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM scratch\nCOPY . /\n")
    docker("build", "--file", dockerfile, "--output", tmp_path / "context", context)
    sent = {path.name for path in (tmp_path / "context").iterdir()}
    assert sent == needed, f"the build context must be {sorted(needed)}, got {sorted(sent)}"


def build_builder(folder, *options):
    """Build the stage builder. Return its exit status and its output in lower case."""
    command = ["build", "--target=builder", "--output=type=cacheonly", "--progress=plain", *options]
    result = docker(*command, folder, check=False)
    return result.returncode, (result.stdout + result.stderr).lower()


# Only its source is published.
DOCOPT = """docopt==0.6.2 \
    --hash=sha256:49b3a825280bd66b3aa83585ef59c4a8c82f2c8a522dbe754a8bc8d08c85c491"""


@step(3)
@pytest.mark.parametrize(
    ("kind", "requirement", "reason"),
    [
        ("without a hash", "blinker==1.9.0", "hash"),
        ("that has to be compiled", DOCOPT, "no matching distribution"),
    ],
    ids=["no hash", "no wheel"],
)
def test_build_rejects_package(context, kind, requirement, reason):
    """The build rejects a package {kind}."""
    (context / "requirements.txt").write_text(requirement + "\n")
    status, output = build_builder(context)
    assert status, f"the build installed a package {kind}: {requirement.split()[0]}"
    assert reason in output, f"the build failed for another reason: {output[-300:]}"


@step(6)
def test_build_installs_from_given_index(app_folder):
    """With the build argument PIP_INDEX_URL, pip installs from that index."""
    index = "file:///no-such-index"
    _, output = build_builder(app_folder, "--build-arg", f"PIP_INDEX_URL={index}")
    assert f"looking in indexes: {index}" in output, "the build ignores PIP_INDEX_URL"


# The running container


@pytest.fixture(scope="module")
def web(image):
    """A container with all restrictions, which the tests leave as it is."""
    options = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    with container(image, *options, "--user", "1234567:0") as started:
        yield started


@step(5)
def test_runs_restricted_as_any_user(web):
    """A container also runs with a read-only root, without capabilities, and as an unknown user."""
    assert web.get().status == 200


@step(5)
def test_first_process_is_server(web):
    """Process 1 is a production server, and not a shell, which would not pass on the SIGTERM."""
    server = web.get().headers.get("Server", "")
    command = web.python("print(open('/proc/1/cmdline').read().replace(chr(0), ' '))").strip()
    assert not re.match(r"\S*sh ", command), f"process 1 is a shell: {command}"
    assert "Werkzeug" not in server, f"process 1 is Flask's development server: {command}"


@step(5)
def test_shows_environment(web):
    """The response to / has the env lab."""
    env = web.get().json["env"]
    assert env == "lab", f"the env must be 'lab', got {env!r}"


@step(5)
def test_exits_with_status_0_when_stopped(image):
    """On `docker stop`, a container exits with status 0, since its program handles SIGTERM."""
    with container(image) as stopped:
        docker("stop", stopped.name)  # kills after ten seconds; serve.py kills a worker after five
        status = stopped.inspect()["State"]["ExitCode"]
        assert status != 137, "it did not handle the SIGTERM of docker stop, and was killed"
        assert status == 0, f"it exited with status {status}; its log: {stopped.log()[-300:]}"


@step(6)
def test_labels_and_health_show_build(image, builder, web):
    """The labels and /health have the version and the date of the build."""
    labels = inspect(image, "image")["Config"]["Labels"] or {}
    expected = {
        "service": "lab25-web",
        "env": "lab",
        "org.opencontainers.image.title": "lab25-web",
        "org.opencontainers.image.version": BUILD_VERSION,
        "org.opencontainers.image.created": BUILD_DATE,
        "stage": None,  # of the builder only
    }
    for name, value in expected.items():
        got = labels.get(name)
        assert got == value, f"the label {name} must be {value!r} in this build, got {got!r}"
    assert labels.get("maintainer"), "the label maintainer is missing"
    stage = (inspect(builder, "image")["Config"]["Labels"] or {}).get("stage")
    assert stage == "builder", f"the stage builder must have the label stage=builder, got {stage!r}"
    health = web.get("/health").json
    shown = health["version"], health["build_date"]
    assert shown == (BUILD_VERSION, BUILD_DATE), f"/health shows another build: {shown}"


@step(6)
def test_build_without_arguments_has_defaults(image, app_folder):
    """Without build arguments the version is dev and the date is unknown."""
    environment = inspect(build("plain", context=app_folder), "image")["Config"]["Env"]
    for setting in ("BUILD_VERSION=dev", "BUILD_DATE=unknown"):
        assert setting in environment, f"a build without arguments does not set {setting}"


# The health check


def health_check(image):
    """Return the settings of the image's health check."""
    check = inspect(image, "image")["Config"].get("Healthcheck")
    assert check and check["Test"] != ["NONE"], "the image has no health check"
    return check


# Runs a command next to a server that returns 404 for /health and 200 for /.
NEXT_TO_404 = """
import http.server, subprocess, sys, threading
server = http.server.HTTPServer(("127.0.0.1", 9090), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


def run_health_check(image, web, *settings, before=()):
    """Run the health check's command in the container. Return its exit status and its output."""
    kind, *command = health_check(image)["Test"]
    assert not command[0].startswith('["'), (
        "its command looks like a list but is not, so Docker takes it for a shell command: "
        "a double quote within one of its strings ends that string"
    )
    if kind == "CMD-SHELL":
        command = ["sh", "-c", *command]
    settings = [f"--env={setting}" for setting in settings]
    result = docker("exec", *settings, web.name, *before, *command, check=False)
    return result.returncode, (result.stdout + result.stderr).strip()


def outcome(status, output):
    """Return what a message shows of a command: its exit status and its last line."""
    *_, last_line = ["nothing", *output.splitlines()]
    return f"exits with status {status} and prints {last_line[-200:]}"


@step(5)
def test_health_check_is_frequent_and_limited(image):
    """Docker checks within a second of the start, then every ten seconds, with a limit of three."""
    check = {"Interval": 30e9, "Timeout": 30e9, "StartPeriod": 0, "StartInterval": 5e9}
    check |= health_check(image)
    every, timeout, start_period, start_interval = (
        check[name] / 1e9 for name in ("Interval", "Timeout", "StartPeriod", "StartInterval")
    )
    first = min(every, start_interval) if start_period else every
    assert first <= 1, f"Docker checks for the first time {first:.0f} s after the start"
    assert every <= 10, f"Docker checks only every {every:.0f} s"
    assert timeout <= 3, f"Docker waits {timeout:.0f} s for a check"
    assert start_period >= 10, f"a failed check counts {start_period:.0f} s after the start already"


@step(5)
def test_health_check_needs_status_200_of_health(image, web):
    """The health check succeeds only if /health returns status 200."""
    status, output = run_health_check(image, web)
    assert status == 0, f"it {outcome(status, output)}, although /health returns status 200"
    next_to_404 = ["python", "-c", NEXT_TO_404]
    status, _ = run_health_check(image, web, "HOST=127.0.0.1", "PORT=9090", before=next_to_404)
    assert status, "it exits with status 0, although /health returns status 404"


@step(5)
def test_health_check_uses_host_and_port(image, web):
    """The health check uses HOST and PORT, or 127.0.0.1 and 8080 if they are empty."""
    for setting in ("HOST=127.0.0.2", "HOST=", "PORT="):
        status, output = run_health_check(image, web, setting)
        assert status == 0, f"with {setting} it {outcome(status, output)}, although the app answers"
    for setting in ("HOST=no-such-host", "PORT=9"):
        status, _ = run_health_check(image, web, setting)
        assert status, f"with {setting} it exits with status 0, although nothing listens there"


@step(6)
def test_compiles_no_module_again(image):
    """The image has the bytecode of each module that the service or the health check imports."""
    # No Redis listens there, but the app imports all that it needs to connect.
    settings = ["--env=REDIS_HOST=127.0.0.1", "--env=PYTHONVERBOSE=1"]
    with container(image, *settings) as verbose:
        verbose.get()
        _, output = run_health_check(image, verbose)
        compiled = set(re.findall(r"# code object from (/.*\.py)$", verbose.log() + output, re.M))
    found = sorted(path for path in compiled if not path.startswith("/app/"))
    assert not found, f"each start or check compiles {len(found)} modules again, such as {found[0]}"
