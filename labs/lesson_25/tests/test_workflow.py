"""What the workflow publishes, and when: its expressions are evaluated and its scripts run.

GitHub, the registry, the image and the actions are stand-ins. What a linter reports is not tested.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import yaml

from harness import REPOSITORY

IMAGE = "ghcr.io/some-capitals/lab25-web"
DIGEST = f"sha256:{'a' * 64}"
COMMIT, NEWER_COMMIT = "0a1b2c3" + "0" * 33, "4d5e6f7" + "0" * 33
SHA_TAG = "sha-0a1b2c3"


def read(path):
    return yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))


WORKFLOW = read(".github/workflows/docker-image-lab25.yml")
WEEKLY = read(".github/workflows/weekly-lab25.yml")
JOBS = WORKFLOW["jobs"]

# A small part of GitHub: expressions, jobs that need others, steps in their order

FUNCTIONS = {"contains": lambda items, item: item in items, "fromJSON": json.loads}
WORDS = re.compile(r"'[^']*'|&&|\|\||(?P<name>[A-Za-z_][\w.-]*)\b(?!\()")


def evaluate(expression, known):
    """Return the value of an expression; a name that is not known is an empty string."""

    def python(match):
        if match["name"]:
            return f"known.get({match['name']!r}, '')"
        return {"&&": " and ", "||": " or "}.get(match[0], match[0])

    return eval(WORDS.sub(python, expression).strip(), {**FUNCTIONS, "known": known})


def render(values, known):
    """Return a mapping with the expressions in its texts replaced by their values."""

    def text_of(match):
        value = evaluate(match[1], known)
        return str(value).lower() if isinstance(value, bool) else value

    return {name: re.sub(r"\$\{\{(.*?)\}\}", text_of, str(text)) for name, text in values.items()}


# The stand-ins find their world in files, and write to the file `calls` what they were told to do.
GH = r"""#!/bin/sh
[ "$GH_TOKEN" ] || exit 4
[ "$1" != attestation ] || { echo "verify $3" >>"$WORLD/calls"; exit; }
jq --raw-output --arg path "$2" ".[\$path] // error | $4" "$WORLD/github"
"""
DOCKER = r"""#!/bin/sh
[ -e "$WORLD/login" ] || { echo 'ERROR: denied' >&2; exit 1; }
echo "$* $COMPOSE_FILE $IMAGE_TAG" >>"$WORLD/calls"
case "$*" in *inspect*)
    tag=${4##*:}
    answer=$(jq --raw-output ".[\"$tag\"] // \"$4: not found\"" "$WORLD/registry")
    [ "$answer" = published ] || { echo "ERROR: $answer" >&2; exit 1; }
esac
"""
CURL = r"""#!/bin/sh
case "$*" in */health) cat "$WORLD/health" ;; *) cat "$WORLD/hit" ;; esac
"""

WORLD = {
    "event": "push",
    "ref": "refs/heads/main",
    "head": COMMIT,  # the newest commit of the branch on GitHub
    "releases": [],  # the tags on GitHub
    "private": False,
    "platforms": "",  # the repository's variable
    "github_lacks": "nothing",  # a path that GitHub's API does not answer
    "registry": {},  # "published" or an error, by tag
    "health": {},  # where the image's answer differs from what it should be
    "hit": 1,
    "assumed": {"test": "success", "try": "success"},  # jobs that are not run, with their results
}


class Run:
    """A finished run of the workflow: the results of its jobs, and what it did."""

    def __init__(self, folder, world):
        self.folder, self.world = folder, SimpleNamespace(**{**WORLD, **world})
        self.pushed, self.output, self.results = [], "", {}
        self.prepare()
        for name, job in JOBS.items():
            needed = re.findall(r"\w+", str(job.get("needs", "")))
            wanted = evaluate(job.get("if", "true"), self.known)
            if not wanted or any(self.results[other] != "success" for other in needed):
                self.results[name] = "skipped"
                continue
            self.results[name] = self.world.assumed.get(name) or self.finish(job)
            self.learn(f"needs.{name}.outputs", job.get("outputs", {}))

    def prepare(self):
        world = self.world
        _, kind, name = world.ref.split("/", 2)
        github = {
            "": {"default_branch": "main", "private": world.private},
            f"/branches/{quote(name, safe='')}": {"commit": {"sha": world.head}},
            f"/git/matching-refs/tags/{name.rpartition('.')[0]}.": [
                {"ref": f"refs/tags/{release}"} for release in world.releases
            ],
        }
        github.pop(world.github_lacks, None)
        self.write(github={f"repos/Some-Capitals/orders{path}": github[path] for path in github})
        self.write(registry=world.registry, hit={"hit_count": world.hit}, calls="")
        self.write(gh=GH, docker=DOCKER, curl=CURL)
        for command in ("gh", "docker", "curl"):
            (self.folder / command).chmod(0o755)
        context = {
            "event_name": world.event,
            "ref": world.ref,
            "ref_name": name,
            "ref_type": {"tags": "tag"}.get(kind, "branch"),
            "sha": COMMIT,
            "repository": "Some-Capitals/orders",
            "repository_owner": "Some-Capitals",
            "output": str(self.folder / "outputs"),
        }
        self.known = {"true": True, "vars.PLATFORMS": world.platforms}
        self.learn("github", {**context, "token": "token", "run_id": "7"})
        self.variables = {f"GITHUB_{key.upper()}": value for key, value in context.items()}
        self.variables["PATH"] = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        self.variables["WORLD"] = str(self.folder)

    def write(self, **contents):
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (self.folder / name).write_text(text, encoding="utf-8")

    def learn(self, prefix, values):
        for name, text in render(values, self.known).items():
            self.known[f"{prefix}.{name}"] = text

    def finish(self, job):
        """Run the steps of a job in their order; return the result."""
        (self.folder / "login").unlink(missing_ok=True)
        environment = render({**WORKFLOW["env"], **job.get("env", {})}, self.known)
        self.learn("env", environment)
        for step in job["steps"]:
            if not evaluate(step.get("if", "true"), self.known):
                continue
            variables = environment | render(step.get("env", {}), self.known)
            if "run" in step and not self.succeeds(step, variables):
                return "failure"
            inputs = render(step.get("with", {}), self.known)
            match step.get("uses", "").partition("@")[0]:
                case "docker/login-action":
                    self.write(login="")
                case "docker/build-push-action":
                    self.build(inputs)
                case "docker/metadata-action":
                    tags = "\n".join(f"{inputs['images']}:{tag}" for tag in self.list_tags(inputs))
                    environment["DOCKER_METADATA_OUTPUT_TAGS"] = tags
                    self.learn("env", environment)
                case "actions/attest":
                    signed = f"sign {inputs['subject-name']}@{inputs['subject-digest']}\n"
                    self.write(calls=self.calls + signed)
        return "success"

    def succeeds(self, step, variables):
        """Run a script as GitHub's runner does, and learn its outputs."""
        self.write(outputs="")
        shell = WORKFLOW.get("defaults", {}).get("run", {}).get("shell")
        options = ["-eo", "pipefail"] if shell == "bash" else ["-e"]
        done = subprocess.run(
            ["bash", "--norc", *options, "-c", step["run"]],
            env=self.variables | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.output += done.stdout + done.stderr
        lines = (self.folder / "outputs").read_text().splitlines()
        self.learn(f"steps.{step.get('id')}.outputs", dict(line.split("=", 1) for line in lines))
        return done.returncode == 0

    def build(self, inputs):
        """Do what docker/build-push-action does; the image answers with what it was told."""
        told = dict(line.split("=") for line in inputs["build-args"].splitlines())
        truth = {"version": told["BUILD_VERSION"], "build_date": told["BUILD_DATE"]}
        self.write(health={**truth, "redis_ok": True, **self.world.health})
        self.known["steps.build.outputs.digest"] = DIGEST
        if inputs["push"] == "true":
            self.pushed.append(inputs["tags"])

    def list_tags(self, inputs):
        """Return what docker/metadata-action lists."""
        name = self.world.ref.split("/", 2)[2]
        release = re.fullmatch(r"v(\d+)\.(\d+)\.\d+", name)
        tags = ["latest"] if release and inputs["flavor"] != "latest=false" else []
        for line in inputs["tags"].splitlines():
            rule = dict(part.split("=") for part in line.split(","))
            match rule["type"] if rule["enable"] == "true" else "disabled":
                case "raw":
                    tags.append(rule["value"])
                case "ref":
                    tags.append(re.sub(r"[^\w.-]+", "-", name))
                case "semver" if release:
                    tags.append(".".join(release.groups()))
        return tags

    @property
    def calls(self):
        return (self.folder / "calls").read_text()

    @property
    def tags(self):
        """The tags that were given; fail if they lead to another image than the one tried."""
        given = re.findall(r"imagetools create (.*) (\S+) ", self.calls)
        assert {target for _, target in given} <= {f"{IMAGE}@{DIGEST}"}, given
        return {tag.removeprefix(f"--tag={IMAGE}:") for tags, _ in given for tag in tags.split()}


@pytest.fixture
def run(tmp_path):
    """A function that runs the workflow in a world that differs from WORLD in its arguments."""
    if sys.platform != "linux" or not shutil.which("jq"):
        pytest.skip("the scripts need what GitHub's runners have: Linux and jq")
    return lambda **world: Run(tmp_path, world)


# Which tags an image gets

MAIN = {"main", "latest", "dev"}


@pytest.mark.parametrize(
    ("event", "newest", "registry", "tags"),
    [
        ("push", COMMIT, {}, {SHA_TAG, *MAIN}),
        ("schedule", COMMIT, {SHA_TAG: "published"}, MAIN),
        ("push", NEWER_COMMIT, {SHA_TAG: "published"}, set()),
        ("push", NEWER_COMMIT, {}, {SHA_TAG}),
    ],
    ids=["newest", "weekly", "older-again", "older-that-had-failed"],
)
def test_main_moves_its_tags_only_at_newest_commit(run, event, newest, registry, tags):
    done = run(event=event, head=newest, registry=registry)
    assert done.tags == tags, done.output


@pytest.mark.parametrize(
    ("branch", "own"),
    [(name, {name}) for name in ("topic", "Feature_X.2", "2-fix", "x" * 128)]
    + [(name, set()) for name in ("#12-fix", "topic/1", "x" * 129, "dev", "1.2", "run-7", SHA_TAG)],
)
def test_branch_moves_its_own_tag_if_valid_and_free(run, branch, own):
    ref = f"refs/heads/{branch}"
    done = run(event="workflow_dispatch", ref=ref)
    assert done.tags == {SHA_TAG, *own}, done.output


@pytest.mark.parametrize(
    ("release", "others", "published", "tags"),
    [
        ("v1.2.3", [], [], {"1.2.3", "1.2"}),
        ("v1.2.3", [], ["1.2.3"], {"1.2"}),
        ("v1.2.10", ["v1.2.9"], ["1.2.9"], {"1.2.10", "1.2"}),
        ("v1.2.9", ["v1.2.10"], ["1.2.10"], {"1.2.9"}),
        ("v1.2.9", ["v1.2.10"], ["1.2.9", "1.2.10"], set()),
        ("v1.2.9", ["v1.2.010", "v1.2.11-rc1", "v1.2.9.5"], [], {"1.2.9", "1.2"}),
    ],
    ids=["first", "again", "10-after-9", "9-after-10", "9-again", "beside-odd-tags"],
)
def test_release_moves_its_line_only_as_highest(run, release, others, published, tags):
    registry = dict.fromkeys(published, "published")
    done = run(ref=f"refs/tags/{release}", releases=[release, *others], registry=registry)
    assert done.tags == tags, done.output


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        ({"github_lacks": "/branches/main"}, "error"),
        ({"github_lacks": "/git/matching-refs/tags/v1.2.", "ref": "refs/tags/v1.2.3"}, "error"),
        ({"github_lacks": ""}, "error"),
        ({"registry": {SHA_TAG: "503"}}, f"Cannot look up {IMAGE}:{SHA_TAG}: ERROR: 503"),
        ({"registry": {SHA_TAG: "token: not found"}}, "ERROR: token: not found"),
    ],
    ids=str,
)
def test_no_tag_moves_if_github_or_registry_fails(run, world, reason):
    done = run(**world)
    assert done.results["publish"] == "failure", done.output
    assert done.tags == set()
    assert reason in done.output


@pytest.mark.parametrize("private", [False, True])
def test_only_public_image_is_signed_and_verified(run, private):
    expected = [] if private else [f"sign {IMAGE}@{DIGEST}", f"verify oci://{IMAGE}@{DIGEST}"]
    assert re.findall(r"^(?:sign|verify) .*", run(private=private).calls, re.M) == expected


# What comes before the tags


@pytest.mark.parametrize("tag", ["v2026.01.15", "v01.2.3", "v1.2.3-rc1", "v1.2", "1.2.3"])
def test_tag_that_is_no_release_is_rejected_before_build(run, tag):
    done = run(event="workflow_dispatch", ref=f"refs/tags/{tag}")
    assert done.results["build"] == "failure"
    assert re.search(rf"::error::.* v1\.2\.3, .*got {tag}\.", done.output), done.output
    assert "steps.build.outputs.digest" not in done.known


PUBLISHES = {"push": True, "workflow_dispatch": True, "schedule": True}
ONLY_BUILDS = {"pull_request": False, "merge_group": False, "not_known_yet": False}


@pytest.mark.parametrize(("event", "publishes"), {**PUBLISHES, **ONLY_BUILDS}.items())
def test_only_events_that_publish_log_in_and_push(run, event, publishes):
    done = run(event=event)
    assert done.results["build"] == "success", done.output
    assert done.pushed == ([f"{IMAGE}:run-7"] if publishes else [])
    assert (done.folder / "login").exists() == publishes
    assert done.results["publish"] == ("success" if publishes else "skipped")


@pytest.mark.parametrize(("job", "pushed"), [("test", []), ("try", [f"{IMAGE}:run-7"])])
def test_failed_job_stops_what_follows(run, job, pushed):
    done = run(assumed={"test": "success", job: "failure"})
    assert done.pushed == pushed
    assert done.results["publish"] == "skipped"


@pytest.mark.parametrize(
    "fault",
    [
        {"health": {"version": COMMIT[:7]}},
        {"health": {"build_date": "unknown"}},
        {"health": {"redis_ok": False}},
        {"hit": None},
    ],
    ids=str,
)
def test_no_image_gets_a_tag_with(run, fault):
    done = run(**fault, assumed={"test": "success"})
    assert done.results["try"] == "failure"
    assert done.tags == set()
    assert "compose logs" in done.calls, "the containers' log is not shown"


def test_try_deploys_pushed_digest_and_cleans_up(run):
    done = run(assumed={"test": "success"})
    assert done.results["publish"] == "success", done.output
    calls = [call for call in done.calls.splitlines() if call.startswith("compose")]
    file = "labs/lesson_25/compose/docker-compose.registry.yml"
    assert all(call.endswith(f" {file} run-7@{DIGEST}") for call in calls), calls
    assert calls[-1].startswith("compose down --volumes")
    assert read(file)["services"]["web"]["image"].endswith("/lab25-web:${IMAGE_TAG:-dev}")


@pytest.mark.parametrize(
    ("platforms", "runners"),
    [
        ("", ["ubuntu-24.04", "ubuntu-24.04-arm"]),
        ("linux/arm64, linux/amd64", ["ubuntu-24.04-arm", "ubuntu-24.04"]),
        ("linux/amd64", ["ubuntu-24.04"]),
    ],
)
def test_every_platform_is_tried_on_its_own_runner(run, platforms, runners):
    job, known = JOBS["try"], run(platforms=platforms).known
    tried = evaluate(job["strategy"]["matrix"]["platform"][3:-2], known)
    assert [evaluate(job["runs-on"][3:-2], {"matrix.platform": name}) for name in tried] == runners


# Facts that only these tests guard


def test_job_that_runs_image_cannot_write():
    for name, job in JOBS.items():
        scripts = " ".join(step.get("run", "") for step in job["steps"])
        runs_image = re.search(r"docker (compose|run|start|stack)|pytest", scripts)
        writes = "write" in job["permissions"].values()
        assert not (runs_image and writes), f"{name} runs an image and can write"


TESTS = {"": True, "engine": True, "engine texts": True, "swarm": True, "timing": False}


@pytest.mark.parametrize(("marks", "run_on_push"), TESTS.items())
@pytest.mark.parametrize("event", ["push", "pull_request", "merge_group", "schedule"])
def test_every_mark_but_timing_is_run(event, marks, run_on_push):
    known = {"true": True, "github.event_name": event}
    default = "not engine and not swarm and not timing"  # pytest.ini's
    chosen = []
    for python in JOBS["test"]["strategy"]["matrix"]["python"]:
        known["matrix.python"] = python
        for step in JOBS["test"]["steps"]:
            if "pytest" in step.get("run", "") and evaluate(step.get("if", "true"), known):
                chosen.append(render(step.get("env", {}), known).get("MARKS", default))
    names = {name: name in marks.split() for name in ("engine", "texts", "swarm", "timing")}
    weekly_texts = event == "schedule" and "texts" in marks  # they must not hold back an update
    assert any(eval(marks, names) for marks in chosen) == (run_on_push and not weekly_texts)


@pytest.mark.parametrize("event", ["push", "pull_request", "workflow_dispatch", "schedule"])
def test_only_pull_request_cancels_older_run(event):
    concurrency = WORKFLOW["concurrency"]
    values = render(concurrency, {"github.event_name": event, "github.ref": "main"})
    assert values["group"].endswith("main"), "runs of one branch can overlap"
    assert (values["cancel-in-progress"] == "true") == (event == "pull_request")


def test_every_change_is_checked_and_built_again_weekly():
    """GitHub disables a file with a schedule in forks, so the schedule has its own."""
    events = WORKFLOW[True]  # YAML 1.1 reads the key `on` as true
    assert set(events) == {
        *["push", "pull_request", "merge_group", "workflow_dispatch", "workflow_call"]
    }
    assert set(events["push"]) == {"branches", "tags"}, "a path filter blocks pull requests"
    assert events["pull_request"] is None
    assert set(WEEKLY[True]) == {"schedule"}


def test_published_image_describes_itself():
    (inputs,) = [step["with"] for step in JOBS["build"]["steps"] if step.get("id") == "build"]
    assert (inputs["provenance"], inputs["sbom"], inputs["pull"]) == ("mode=max", True, True)
    labels = re.findall(r"opencontainers\.image\.(\w+)", inputs["labels"])
    assert labels == ["revision", "source"], "the Dockerfile's own labels are replaced"
    assert re.findall(r"index:[\w.]+\.(\w+)", inputs["annotations"]) == ["title", "description"]
    assert "ignore-error=true" in inputs["cache-to"], "a failing cache stops a release"


def test_no_job_hangs_or_ignores_failure():
    for name, job in JOBS.items():
        assert job["timeout-minutes"] <= 30, name
    assert not re.search(r"continue-on-error|always\(\)|failure\(\)|cancelled\(\)", str(JOBS))
