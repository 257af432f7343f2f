"""The image: who it runs as, what it holds and leaves out, what a change costs, how it ends."""

import contextlib
import datetime
import functools
import json
import pathlib
import re
import subprocess
import time
import urllib.parse

import pytest

from conftest import BUILD_DATE, BUILD_VERSION
from harness.clients import counted, eventually, timed
from harness.engine import (
    BASE,
    RUN,
    base_lines,
    build,
    container,
    docker,
    inspect,
    layer_sizes,
    redis_in,
)
from harness.limits import CHANGED_APP_BYTES, LAYERS_OVER_BASE_BYTES, STOP_SECONDS

pytestmark = pytest.mark.engine

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def builder(image, app_folder):
    """The stage `builder` as an image."""
    return build_stage(app_folder, "builder")


# Whatever address the image itself listens on: what asks by this is about something else.
REACHABLE = ["--env", "HOST=0.0.0.0"]


@pytest.fixture(scope="module")
def web(image):
    """A container of the image, without Redis; shared, so that tests leave it as it is."""
    with container(image, *REACHABLE) as made:
        yield made


def build_stage(folder, stage, *options):
    """Build one stage of the Dockerfile in `folder` and return the image's name."""
    name = f"stage-{stage}"
    try:
        return build(name, "--target", stage, *options, context=folder)
    except AssertionError as error:
        last_line = str(error).strip().splitlines()[-1]
        pytest.fail(f"the stage {stage!r} does not build alone: {last_line}", pytrace=False)


def run(image, *command):
    """Return what a command prints in a new container, as root."""
    options = ["--rm", "--user", "0", "--entrypoint", command[0]]
    return docker("run", *options, image, *command[1:]).stdout


def run_python(image, program, *options):
    """Return what a Python program prints in a new container, as the image's own user."""
    return docker("run", "--rm", "--entrypoint", "python", *options, image, "-c", program).stdout


def when(text):
    return datetime.datetime.fromisoformat(text)


def next_second():
    """Wait until the engine's clock has begun a second, and return it.

    A history tells when a layer was made in whole seconds, by the clock of the engine's machine.
    """
    now = when(docker("info", "--format", "{{.SystemTime}}").stdout.strip())
    time.sleep(1 - now.microsecond / 1_000_000)
    return now.replace(microsecond=0) + datetime.timedelta(seconds=1)


def new_layers(image, since):
    """Return the unpacked bytes of each layer of `image` that was made at `since` or later.

    A layer that comes from the cache was made before. Layers are not compared with those of another
    image: if two builds have made the same step, the cache may give either result.
    """
    times = docker("history", "--human=false", "--format", "{{.CreatedAt}}", image).stdout.split()
    lines = zip(layer_sizes(image), times, strict=True)
    return [size for size, time in lines if size and when(time) >= since]


def made_here(image):
    """Return (bytes, command) of each line of the history over the base, newest first."""
    lines = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout.splitlines()
    return list(zip(layer_sizes(image), lines, strict=True))[: -base_lines()]


# What it holds

# Prints, as JSON by kind, what of a build is left in the container.
FIND_LEFTOVERS = r"""
import importlib.util, json, os, re, shutil
tools = "gcc cc g++ c++ clang cpp ld as make cmake curl wget git uv poetry cargo rustc".split()
caches = "/var/lib/apt/lists", "/var/cache/apt/archives", "/root/.cache", "/install", "/tmp"
own_files = re.compile(
    r"^(requirements.*(txt|in)|Dockerfile.*|test_.*\.py|\.(dockerignore|git|env).*)$"
)
found = {
    "tools": [shutil.which(tool) for tool in tools if shutil.which(tool)],
    "pip": [shutil.which(tool) for tool in ("pip", "pip3", "wheel") if shutil.which(tool)],
    "caches": [],
    "files": [],
}
for name in "pip", "ensurepip", "setuptools", "wheel":
    if importlib.util.find_spec(name):
        found["pip"].append("import " + name)
for name in "pytest", "fakeredis":
    if importlib.util.find_spec(name):
        found["files"].append("import " + name)
for where, folders, files in os.walk("/"):
    if where == "/":
        folders[:] = [folder for folder in folders if folder not in ("proc", "sys", "dev")]
    for file in files:
        path = os.path.join(where, file)
        if re.search(r"^pip-.*whl$", file):
            found["pip"].append(path)
        if where.startswith(caches) and file != "lock":
            found["caches"].append(path)
        if own_files.match(file) or (where.startswith("/app") and not file.endswith(".py")):
            found["files"].append(path)
print(json.dumps(found))
"""


@functools.cache
def leftovers(image):
    """Return what of a build is left in `image`, as lists of paths by kind."""
    return json.loads(run(image, "python", "-B", "-c", FIND_LEFTOVERS))


def none_left(image, kind, what):
    """Fail with the first few paths where something of this kind is left."""
    found = leftovers(image)[kind]
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    assert not found, f"{what} in what runs: {', '.join(found[:4])}{more}"


def test_the_search_for_leftovers_finds_them():
    """Where it finds no pip in the base image, it would find none in ours."""
    assert {"import pip", "import ensurepip"} <= set(leftovers(BASE)["pip"])


def test_holds_no_build_tool(image):
    """No compiler, make, curl or git is in what runs."""
    none_left(image, "tools", "a tool that only a build needs is")


def test_holds_no_package_cache(image):
    """No cache and no list of packages that apt or pip left is in what runs."""
    none_left(image, "caches", "files that installing left behind are")


def test_holds_no_pip(image):
    """Neither pip is in what runs, nor what could bring it back."""
    none_left(image, "pip", "what installs packages is")


def test_holds_no_file_of_the_build(image):
    """Of the folder's files only the app's own .py files are in what runs."""
    none_left(image, "files", "files that the running app never reads are")


def test_holds_the_locked_packages_and_no_other(image, app_folder):
    """The packages are exactly those of requirements.txt."""
    text = (app_folder / "requirements.txt").read_text()
    locked = set(re.findall(r"^([a-z0-9-]+==[^ ]+) \\$", text, re.M))
    program = (
        "import importlib.metadata as metadata\n"
        "for package in metadata.distributions():\n"
        "    print(f'{package.name.lower()}=={package.version}')"
    )
    found = set(run_python(image, program).split())
    assert not found - locked, f"packages that nobody locked: {', '.join(sorted(found - locked))}"
    assert not locked - found, f"locked, but not there: {', '.join(sorted(locked - found))}"


def test_stays_below_its_limit_over_the_base(image):
    """What it adds to its base image is less than 36 MB."""
    steps = made_here(image)
    total = sum(size for size, _ in steps)
    large = sorted((step for step in steps if step[0] > MEGABYTE / 10), reverse=True)
    shown = "\n".join(f"{size / MEGABYTE:.1f} MB: {command[:150]}" for size, command in large)
    limit = LAYERS_OVER_BASE_BYTES / MEGABYTE
    assert total < LAYERS_OVER_BASE_BYTES, (
        f"it adds {total / MEGABYTE:.1f} MB to its base, and {limit:.0f} are the limit; "
        f"a later step makes no earlier one smaller\n{shown}"
    )


def test_a_build_takes_in_only_what_it_needs(context, tmp_path):
    """The build gets the app's files and requirements.txt, and none that lies beside them."""
    needed = {path.name for path in context.glob("*.py")} | {"requirements.txt"}
    (context / ".env").write_text("TOKEN=secret")
    (context / "notes.txt").write_text("what nobody thought of")
    (context / "large.bin").write_bytes(bytes(1_000_000))
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM scratch\nCOPY . /\n")
    docker("build", "--file", dockerfile, "--output", tmp_path / "context", context)
    sent = {path.name for path in (tmp_path / "context").iterdir()}
    assert not sent - needed, f"the build also gets {', '.join(sorted(sent - needed))}"
    assert not needed - sent, f"the build does not get {', '.join(sorted(needed - sent))}"


# The two stages


def test_the_builder_builds_alone(image, app_folder, builder):
    """The stages builder and runtime build alone, and builder has the packages in /install."""
    build_stage(app_folder, "runtime", "--output", "type=cacheonly")
    flask = docker(
        "run", "--rm", "--entrypoint", "test", builder, "-x", "/install/bin/flask", check=False
    )
    assert flask.returncode == 0, "there is no /install/bin/flask in the stage 'builder'"


def test_the_history_shows_what_came_from_the_builder(image):
    """The packages came by one COPY, and nothing that installs is in the history."""
    steps = made_here(image)
    installing = [
        command for _, command in steps if re.search(r"pip3? install|apt(-get)? ", command)
    ]
    assert not installing, f"the image's own stage installs something: {installing[0][:100]}"
    size, command = max(steps)
    assert re.search(r"\bCOPY\b", command), (
        f"the packages did not come by a COPY: the largest step, {size / MEGABYTE:.1f} MB, "
        f"is {command[:100]}"
    )


def test_the_app_is_in_a_folder_of_its_own(image, app_folder):
    """The app's .py files are in /app, and a container of it starts there."""
    folder = inspect(image, "image")["Config"]["WorkingDir"] or "/"
    assert folder == "/app", (
        f"a container of it starts in {folder} instead of /app: "
        "what one stage sets does not hold in the next"
    )
    found = run_python(image, "import os; print(*os.listdir())").split()
    lost = {path.name for path in app_folder.glob("*.py")} - set(found)
    assert not lost, f"not in /app, but elsewhere or nowhere: {', '.join(sorted(lost))}"


def test_names_the_python_version_in_from_alone(image, builder):
    """No step names the Python version of its base again, so a newer base needs one change."""
    for one in (image, builder):
        naming = [command for _, command in made_here(one) if re.search(r"python-?3\.\d", command)]
        assert not naming, f"a step names the Python version a second time: {naming[0][:100]}"


# Who it runs as


def test_its_user_is_a_number_and_not_root(image):
    """Its user is 10001, by number: from a name nobody can tell that it is not root."""
    user = inspect(image, "image")["Config"]["User"]
    number = user.partition(":")[0]
    assert number, "no user is set, so it runs as root"
    assert number.isdecimal(), f"the user is the name {user!r}: a cluster cannot see its number"
    assert number == "10001", f"the user has the number {number} instead of 10001"


def test_runs_as_appuser_with_no_shell_and_no_home(image):
    """The user is appuser, number 10001, without a shell, a home and root's group."""
    program = (
        "import os, pwd\n"
        "user = pwd.getpwnam('appuser')\n"
        "print(user.pw_uid, user.pw_shell, os.path.exists(user.pw_dir), os.getuid(), os.getgid())"
    )
    result = docker("run", "--rm", "--entrypoint", "python", image, "-c", program, check=False)
    assert result.returncode == 0, f"no user appuser: {result.stderr.strip().splitlines()[-1]}"
    number, shell, home_exists, runs_as, group = result.stdout.split()
    assert number == "10001", f"appuser has the number {number} instead of 10001"
    assert runs_as == "10001", f"it runs as user {runs_as} instead of 10001"
    assert group != "0", "it runs in root's group"
    assert shell.endswith(("nologin", "false")), f"appuser has the shell {shell}"
    assert home_exists == "False", "appuser has a home folder"


def test_cannot_change_its_own_program(image):
    """The user may change neither the app nor the packages."""
    program = (
        "import glob, os\n"
        "paths = ['/app', *glob.glob('/app/*'), '/usr/local/lib', '/usr/local/bin']\n"
        "print(*[path for path in paths if os.access(path, os.W_OK)])"
    )
    writable = run_python(image, program).split()
    assert not writable, f"a hole in the app could change {', '.join(writable)}"


def test_runs_though_only_its_owner_may_read_the_files(context):
    """Its user can read the app, also where the files of the folder are their owner's alone."""
    for path in context.glob("*.py"):
        path.chmod(0o600)
    private = build("private", context=context)
    program = (
        "import glob, os\n"
        "for path in glob.glob('/app/*.py'):\n"
        "    print(path, os.access(path, os.R_OK))"
    )
    found = run_python(private, program).splitlines()
    unreadable = [line.split()[0] for line in found if line.endswith("False")]
    assert found, "there is no .py file in /app"
    assert not unreadable, f"its user may not read {', '.join(sorted(unreadable))}"


def test_runs_read_only_without_capabilities_and_as_any_user(image):
    """It also runs on a read-only root, without any capability, as a user that nobody made."""
    hardened = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    with container(image, *hardened, "--user", "1234567:0") as made:
        assert made.get().status == 200


# What a change costs


def test_a_change_of_the_app_makes_one_small_new_layer(image, context):
    """After a change of app.py no package is installed or sent again: less than 100 kB are new."""
    with (context / "app.py").open("a") as file:
        file.write(f"# changed by {RUN}\n")
    before = next_second()
    new = new_layers(build("changed", context=context), since=before)
    assert new, "the change of app.py is not in the image"
    assert sum(new) < CHANGED_APP_BYTES, (
        f"a change of app.py made {sum(new) / MEGABYTE:.1f} MB anew: a changed layer makes anew "
        "all that come after it, and a large one comes after the app"
    )


def test_a_new_version_makes_no_new_layer(image, app_folder):
    """Another BUILD_VERSION makes no layer anew."""
    before = next_second()
    other = build("other", "--build-arg", f"BUILD_VERSION={RUN}", context=app_folder)
    new = new_layers(other, since=before)
    assert not new, (
        f"a new version made {sum(new) / MEGABYTE:.1f} MB anew, at every build: "
        "something that adds a layer comes after the first use of BUILD_VERSION"
    )


@pytest.mark.parametrize(
    ("kind", "requirement", "refusal"),
    [
        ("without a hash", "blinker==1.9.0", "hash"),
        (
            "that would have to be compiled",
            # published as source alone
            "docopt==0.6.2 "
            "--hash=sha256:49b3a825280bd66b3aa83585ef59c4a8c82f2c8a522dbe754a8bc8d08c85c491",
            "no matching distribution",
        ),
    ],
    ids=["without a hash", "that would have to be compiled"],
)
def test_a_build_refuses_a_package(context, kind, requirement, refusal):
    """The build stops at a package that has no hash, or that is not ready-made."""
    (context / "requirements.txt").write_text(requirement + "\n")
    result = docker("build", "--target", "builder", "--progress", "plain", context, check=False)
    assert result.returncode, f"the build installed a package {kind}: {requirement.split()[0]}"
    said = result.stdout + result.stderr
    assert refusal in said.lower(), f"the build failed for another reason: {said[-300:]}"


# What it says of itself


def test_labels_and_health_tell_the_build(image, builder, web):
    """Its labels and /health tell the version and the date of the build."""
    config = inspect(image, "image")["Config"]
    labels = config["Labels"] or {}
    wanted = {
        "service": "lab25-web",
        "env": "lab",
        "org.opencontainers.image.title": "lab25-web",
        "org.opencontainers.image.version": BUILD_VERSION,
        "org.opencontainers.image.created": BUILD_DATE,
    }
    for name, value in wanted.items():
        assert labels.get(name) == value, (
            f"the label {name} is {labels.get(name)!r}, in a build where it has to be {value!r}"
        )
    assert labels.get("maintainer"), "the label maintainer names nobody"
    stage = (inspect(builder, "image")["Config"]["Labels"] or {}).get("stage")
    assert stage == "builder", f"in the stage builder, the label stage is {stage!r}"
    assert "stage" not in labels, "the label of the builder is on the image"
    assert set(config["ExposedPorts"]) == {"8080/tcp"}
    answer = web.get("/health").json
    assert answer["version"] == BUILD_VERSION, f"/health says version {answer['version']!r}"
    assert answer["build_date"] == BUILD_DATE, f"/health says build_date {answer['build_date']!r}"


def test_a_build_without_arguments_says_dev(image, app_folder):
    """Without build arguments the version is dev and the date unknown."""
    plain = build("plain", context=app_folder)
    environment = inspect(plain, "image")["Config"]["Env"]
    for setting in ("BUILD_VERSION=dev", "BUILD_DATE=unknown"):
        assert setting in environment, f"a build without arguments does not set {setting}"


# Start, health and end


def test_starts_and_answers(image):
    """A container of it starts, and answers from outside with a 200."""
    with container(image, wait=False) as made:
        docker("start", made.name)

        def ended_or_status():
            return not made.inspect()["State"]["Running"] or made.get("/health").status

        try:
            result = eventually(ended_or_status, 20)
        except AssertionError:
            log = made.log().strip()[-300:]
            problem = "it runs, but nobody outside the container reaches its port 8080"
            pytest.fail(f"{problem}; its log: {log}", pytrace=False)
        state = made.inspect()["State"]
        log = made.log().strip()[-500:] or "empty"
        command = docker("inspect", "--format", '{{.Path}} {{join .Args " "}}', made.name).stdout
        assert result is not True, (
            f"its command `{command.strip()}` ended by itself, status {state['ExitCode']}; "
            f"its log: {log}"
        )
        assert result == 200, f"/health answered {result}"


def test_says_where_it_runs(web):
    """It says that its env is lab, where nobody sets LAB_ENV."""
    env = web.get().json["env"]
    assert env == "lab", f"it says that its env is {env!r}"


def test_the_first_process_is_the_server(web):
    """Process 1 is a production server, and no shell that keeps the SIGTERM for itself."""
    server = web.get("/health").headers.get("Server", "")
    command = web.python("print(open('/proc/1/cmdline').read().replace(chr(0), ' '))").strip()
    program = pathlib.Path(command.split()[0]).name
    assert program not in {"sh", "dash", "bash"}, f"process 1 is a shell: {command}"
    assert "Werkzeug" not in server, f"Flask's development server answers: process 1 is {command}"


def test_ends_with_status_0_when_it_is_stopped(image):
    """`docker stop` ends it with status 0: it hears the SIGTERM and finishes."""
    with container(image, *REACHABLE) as made:
        docker("stop", "--timeout", "5", made.name)
        status = made.inspect()["State"]["ExitCode"]
    assert status != 137, "it did not act on the SIGTERM of docker stop, and was killed in the end"
    assert status == 0, f"docker stop ended it with status {status}; its log: {made.log()[-300:]}"


@pytest.mark.timing
def test_stops_at_once_when_idle(image):
    with container(image) as made:
        seconds = timed(docker, "stop", made.name)
        status = made.inspect()["State"]["ExitCode"]
    assert seconds < STOP_SECONDS, f"docker stop took {seconds:.1f} s"
    assert status == 0, f"docker stop ended it with status {status}"


# Signals process 1 a moment after it can first hear that: before, the kernel drops it.
SIGNAL_EARLY = """
import os, re, sys, time
deadline = time.monotonic() + 30
while not int(re.search("SigCgt:(.*)", open("/proc/1/status").read())[1], 16) >> 14 & 1:
    if time.monotonic() > deadline:
        sys.exit("process 1 has no handler for SIGTERM half a minute after its start")
    time.sleep(0.005)
time.sleep(float(sys.argv[1]))
os.kill(1, 15)
"""


def test_stops_with_status_0_also_while_it_is_still_starting(image):
    with container(image, wait=False) as made:
        for hundredths in range(0, 60, 15):
            docker("start", made.name)
            # What ends takes this along, so its own status says nothing.
            told = made.run("python", "-c", SIGNAL_EARLY, hundredths / 100, check=False)
            assert "no handler" not in told.stderr, told.stderr.strip()
            when = f"told to stop {hundredths / 100} s after it could hear that"
            try:  # a deaf worker is killed after five seconds
                status = docker("wait", made.name, timeout=4).stdout.strip()
            except subprocess.TimeoutExpired:
                pytest.fail(f"{when}, it still ran four seconds later", pytrace=False)
            assert status == "0", f"{when}, it ended with status {status}"


def health_check(image):
    """Return the image's health check, as the engine has it."""
    check = inspect(image, "image")["Config"].get("Healthcheck") or {}
    assert check.get("Test", ["NONE"]) != ["NONE"], "the image has no health check"
    return check


def health_seconds(image, name, default):
    """Return a duration of the image's health check, as the engine takes it where none is set."""
    check = health_check(image)
    return check.get(name, 0) / 1_000_000_000 or default


def test_its_health_is_known_soon_after_the_start(image):
    """The engine looks within a second of the start, so that nobody waits for `healthy`."""
    first = health_seconds(image, "Interval", 30)
    if health_seconds(image, "StartPeriod", 0):
        first = min(first, health_seconds(image, "StartInterval", 5))
    assert first <= 1, f"the engine looks for the first time {first:.0f} s after the start"


def test_its_health_is_asked_often_enough_and_not_for_ever(image):
    """The engine looks every ten seconds, and gives up on an answer after three."""
    every = health_seconds(image, "Interval", 30)
    patience = health_seconds(image, "Timeout", 30)
    start = health_seconds(image, "StartPeriod", 0)
    assert every <= 10, f"the engine looks only every {every:.0f} s"
    assert patience <= 3, f"a check without an answer is given {patience:.0f} s"
    assert start >= 10, f"a slow start is given only {start:.0f} s before a failed check counts"


# Serves on an address and port, answers /health with a status, or never where that is 0, and all
# else with another. Runs the health check meanwhile. Does so for each case that it is given, and
# prints a list: the exit status, or null where it did not end, and the last line that was printed.
CHECK_HEALTH = """
import http.server, json, os, socket, socketserver, subprocess, sys, tempfile, threading, time
command, cases = json.loads(sys.argv[1])
results = []
for settings, address, port, status in cases:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/health":
                self.send_response(500 if status == 200 else 200)
            elif status:
                self.send_response(status)
            else:
                time.sleep(99)
            self.end_headers()
    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        allow_reuse_address = daemon_threads = True
    with Server((address, port), Answer) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        said = tempfile.TemporaryFile("w+")  # a pipe would wait for what a killed shell has started
        try:
            check = subprocess.run(command, env=os.environ | settings, timeout=10,
                                   stdout=said, stderr=subprocess.STDOUT)
            said.seek(0)
            lines = said.read().splitlines() or ["it printed nothing"]
            results.append([check.returncode, lines[-1]])
        except subprocess.TimeoutExpired:
            results.append([None, "it did not end"])
        except OSError as error:  # such a program is not in the image
            results.append([127, str(error)])
        server.shutdown()
print(json.dumps(results))
"""
# Where the app listens with some settings, as test_start.py asks; there the check has to ask.
PLACES = {
    "PORT=9090": ("127.0.0.1", 9090),
    "HOST= PORT=": ("127.0.0.1", 8080),
    "HOST=localhost": ("127.0.0.1", 8080),
    "HOST=:: PORT=80": ("::1", 80),
}


@functools.cache
def health_checks(image):
    """Return (exit status, last words) of the image's own health check in several cases, by case.

    A case is one of PLACES, where /health answers 200, or what it answers at the usual place.
    """
    kind, *command = health_check(image)["Test"]
    if kind == "CMD-SHELL":
        assert not command[0].startswith('["'), (
            "its command looks like a list and is none, so Docker takes it for a shell command: "
            "a double quote within one of its strings ends that string"
        )
        command = ["/bin/sh", "-c", *command]
    cases = {text: (as_settings(text), *place, 200) for text, place in PLACES.items()}
    for status in (200, 404, 0):
        cases[status] = (as_settings("HOST=127.0.0.1 PORT=8080"), "127.0.0.1", 8080, status)
    asked = json.dumps([command, list(cases.values())])
    options = ["--rm", "--init", "--no-healthcheck", "--entrypoint", "python"]
    said = docker("run", *options, image, "-c", CHECK_HEALTH, asked).stdout
    return dict(zip(cases, json.loads(said), strict=True))


def as_settings(text):
    return dict(setting.split("=") for setting in text.split())


def test_the_health_check_follows_host_and_port(image):
    """The health check asks where the app listens, also where HOST and PORT say another place."""
    for settings in PLACES:
        status, words = health_checks(image)[settings]
        assert status == 0, f"with {settings} it fails where the app answers: {words}"


def test_the_health_check_tells_whether_health_is_well(image):
    """The health check succeeds where /health answers 200, and fails where it does not."""
    status, words = health_checks(image)[200]
    assert status == 0, f"it fails though /health, and nothing else, answers 200: {words}"
    status, _ = health_checks(image)[404]
    assert status != 0, "it is content though /health answers 404"
    # Where it does not end, the engine ends it after --timeout, and calls that a failure.
    status, _ = health_checks(image)[0]
    assert status != 0, "it is content though /health never answers"


# A Redis that wants a password, or TLS


@contextlib.contextmanager
def side_by_side(image, *options_of_each):
    """Yield a container of the image for each list of options; all of them serve already."""
    with contextlib.ExitStack() as cleanup:
        made = [
            cleanup.enter_context(container(image, *options, wait=False))
            for options in options_of_each
        ]
        docker("start", *[one.name for one in made])
        for one in made:
            one.wait_for(lambda one=one: one.get("/health"))
        yield made


def test_counts_in_a_redis_that_wants_a_password_and_says_why_where_it_is_wrong(
    image, network, tmp_path
):
    password = """a b'c"d\\e$f/g?h#i@j%k"""
    (tmp_path / "password").write_text(password + "\n")
    mounted, in_url = (
        f"--volume={tmp_path}/password:/password:ro",
        urllib.parse.quote(password, safe=""),
    )
    joined = f"--network={network}"
    settings = [
        [joined, mounted, "--env=REDIS_HOST=redis", "--env=REDIS_PASSWORD_FILE=/password"],
        [joined, "--env=REDIS_HOST=redis", f"--env=REDIS_PASSWORD={password}"],
        [joined, f"--env=REDIS_URL=redis://default:{in_url}@redis:6379/0"],
        [joined, "--env=REDIS_HOST=redis", "--env=REDIS_PASSWORD=no"],
    ]
    with redis_in(network, "--network-alias", "redis") as redis:
        redis.run("redis-cli", "config", "set", "requirepass", password)
        with side_by_side(image, *settings) as (*with_the_password, with_a_wrong_one):
            for number, web in enumerate(with_the_password, start=1):
                assert web.get().json["hit_count"] == number, f"no hit {number}: {web.log()}"
                log = web.log()
                assert password not in log and in_url not in log, f"the password is told: {log}"
            answer = with_a_wrong_one.get()
            assert (answer.status, answer.json["hit_count"]) == (200, None)
            assert "invalid username-password pair" in answer.json["redis_error"]
            assert with_a_wrong_one.get("/health").json["redis_ok"] is False


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
    command = ["redis-server", "--port", "0", "--tls-port", "6379", "--tls-auth-clients", "no"]
    command += ["--tls-cert-file", "/tls/redis.crt", "--tls-key-file", "/tls/redis.key"]
    command += ["--tls-ca-cert-file", "/tls/redis.crt"]
    with container(
        "redis:7-alpine", *mounted, "--network-alias", "redis", wait=False, command=command
    ) as redis:
        docker("start", redis.name)
        urls = [
            "rediss://redis?ssl_ca_certs=/tls/redis.crt",
            "rediss://redis?ssl_ca_certs=/tls/other.crt",
            "rediss://redis",
        ]
        settings = [[*mounted, f"--env=REDIS_URL={url}"] for url in urls]
        with side_by_side(image, *settings) as (trusting, *others):
            assert eventually(lambda: counted(trusting.get())) == 1
            for web in others:
                eventually(
                    lambda web=web: "certificate verify" in str(web.get().json["redis_error"]),
                    broken="a certificate of another authority is not refused",
                )
