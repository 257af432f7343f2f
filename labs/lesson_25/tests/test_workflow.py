"""What the workflows and Dependabot's file promise: read as data, and their scripts run."""

import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from harness import REPOSITORY

RULES = REPOSITORY / ".github" / "publish.py"
IMAGE = "ghcr.io/some-capitals/lab25-web"
DIGEST, OTHER_DIGEST = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
COMMIT, NEWER_COMMIT = "0a1b2c3" + "0" * 33, "4d5e6f7" + "0" * 33


def read(path):
    return yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workflow():
    return read(".github/workflows/docker-image-lab25.yml")


@pytest.fixture(scope="module")
def jobs(workflow):
    return workflow["jobs"]


@pytest.fixture(scope="module")
def events(workflow):
    return workflow[True]  # YAML 1.1 reads the key `on` as true


def the_step(jobs, job, word):
    """Return the one step of a job whose action or script has a word; fail unless there is one."""
    steps = jobs.get(job, {}).get("steps", [])
    found = [step for step in steps if word in step.get("uses", "") + step.get("run", "")]
    assert len(found) == 1, f"{len(found)} steps of the job {job} do `{word}`, instead of one"
    return found[0]


def all_steps(jobs):
    return [(name, step) for name, job in jobs.items() for step in job["steps"]]


def waits_for(jobs, name):
    """Return the jobs that have to be green before a job begins."""
    needs = jobs.get(name, {}).get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*(waits_for(jobs, need) for need in direct))


def started_by_a_pull_request(jobs):
    """Return the jobs that neither exclude a pull request nor wait for one that does."""
    not_for_it = {
        name for name, job in jobs.items() if "event_name != 'pull_request'" in job.get("if", "")
    }
    return {
        name: job for name, job in jobs.items() if not not_for_it & {name, *waits_for(jobs, name)}
    }


def writes(job):
    """Return what a job may change; `permissions` may also be one word for all of them."""
    permissions = job.get("permissions")
    if not isinstance(permissions, dict):
        return {f"permissions: {permissions}"}
    return {scope for scope, access in permissions.items() if access != "read"}


def script_of(job):
    return "\n".join(step.get("run", "") for step in job["steps"])


# Who may do what


def test_a_job_that_runs_the_image_may_not_write_and_one_that_writes_does_not_run_it(jobs):
    runs_something = re.compile(r"docker (compose|run|start|exec|create|stack)|pytest")
    running = {name for name, job in jobs.items() if runs_something.search(script_of(job))}
    assert "try" in running, "nothing deploys the published image: the job try runs no docker"
    for name, job in jobs.items():
        both = name in running and writes(job)
        assert not both, f"the job {name} runs an image, and may write {both}"


def test_only_building_and_naming_write_packages_and_only_attesting_signs(workflow, jobs):
    everywhere = workflow.get("permissions")
    assert everywhere == {}, f"every job has permissions that it was not given: {everywhere}"
    found = {name: writes(job) for name, job in jobs.items() if writes(job)}
    assert found == {
        "build": {"packages"},
        "name": {"packages"},
        "attest": {"id-token", "attestations"},
    }, f"more or less may be written than publishing needs: {found}"


def test_a_job_may_read_what_it_asks_for(jobs):
    """Without `contents` no checkout and no answer of GitHub's, without `packages` no pull."""
    for name, job in jobs.items():
        asked = {"contents"} if "checkout" in str(job["steps"]) else set()
        if "login-action" in str(job["steps"]):
            asked.add("packages")
        missing = asked - set(job.get("permissions") or {})
        assert not missing, f"the job {name} may not read {missing}"


@pytest.mark.parametrize("job", ["build", "try", "name", "attest"])
def test_a_job_that_asks_the_registry_is_logged_in_where_a_package_is_private(jobs, job):
    login = the_step(jobs, job, "login-action").get("with")
    assert login == {
        "registry": "ghcr.io",
        "username": "${{ github.actor }}",
        "password": "${{ github.token }}",
    }, f"the job {job} logs in with {login}"
    first = next(step for step in jobs[job]["steps"] if "checkout" not in step.get("uses", ""))
    assert "login-action" in first.get("uses", ""), f"{job} does something before it logs in"


def test_no_job_hangs_for_hours(jobs):
    for name, job in jobs.items():
        minutes = job.get("timeout-minutes", 360)  # GitHub's own limit
        assert minutes <= 30, f"a hanging job {name} ends after {minutes} minutes only"


def test_a_pull_request_builds_and_tests_but_cannot_publish(jobs):
    started = started_by_a_pull_request(jobs)
    assert {"plan", "lint", "test", "build-only"} == set(started), (
        f"a pull request should be linted, tested and built, and it runs {sorted(started)}"
    )
    for name, job in started.items():
        assert not writes(job), f"a pull request may write: {writes(job)} in the job {name}"
        secret = re.search(r"secrets\.|login-action|'push': True", str(job))
        assert not secret, f"a pull request logs in, pushes or sees a secret in {name}: {secret[0]}"


def test_no_checkout_keeps_a_credential(jobs):
    for name, step in all_steps(jobs):
        if "actions/checkout" in step.get("uses", ""):
            kept = step.get("with", {}).get("persist-credentials", True)
            assert kept is False, f"the checkout of {name} leaves its credential on the disk"


def test_no_script_takes_in_an_expression(jobs):
    """A branch's name is anybody's text: put into a script, it would be run."""
    for name, step in all_steps(jobs):
        assert "${{" not in step.get("run", ""), f"an expression in a script of {name}: {step}"


def test_every_action_is_pinned_to_a_commit_with_its_tag_beside_it():
    """The linters see a missing commit, but not a missing tag, by which people know the version."""
    for file in REPOSITORY.glob(".github/workflows/*.yml"):
        for use in re.findall(r"uses: (?!\./)(.*)", file.read_text(encoding="utf-8")):
            pinned = re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)
            assert pinned, f"{file.name} takes an action that may change: {use}"


def test_every_image_that_the_build_fetches_besides_is_pinned_to_a_digest(workflow, jobs):
    pinned = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
    for name in ("EMULATOR", "BUILDKIT", "SBOM_SCANNER"):
        image = workflow.get("env", {}).get(name)
        assert pinned.fullmatch(str(image)), (
            f"GitHub takes a newer {name} when there is one: {image}"
        )
    for job in ("build", "build-only"):
        emulator = the_step(jobs, job, "setup-qemu-action").get("with", {}).get("image")
        assert emulator == "${{ env.EMULATOR }}", f"{job} takes the emulator {emulator}"
        builder = the_step(jobs, job, "setup-buildx-action").get("with", {}).get("driver-opts")
        assert builder == "image=${{ env.BUILDKIT }}", f"{job} takes the builder {builder}"
    sbom = str(the_step(jobs, "build", "build-push-action")["with"].get("sbom"))
    assert "|| format('generator={0}', env.SBOM_SCANNER)" in sbom, f"the scanner is {sbom}"


# When it runs


def test_runs_for_every_push_pull_request_and_release_whatever_they_change(events):
    """A required check that a path filter skips is never reported, and blocks its pull request."""
    assert {"push", "pull_request", "workflow_dispatch", "workflow_call"} <= set(events), (
        f"the workflow starts on {sorted(events)} only"
    )
    for event in ("push", "pull_request"):
        filters = {"paths", "paths-ignore"} & set(events[event] or {})
        assert not filters, f"a {event} that changes other files starts no run: {filters}"
    assert events["push"].get("branches") == ["main"], "a push to main starts no run"
    assert events["pull_request"] is None, "some pull requests start no run"


@pytest.mark.parametrize(
    ("tag", "starts"),
    [("v1.2.3", True), ("v1.2.10", True), ("v2026.01.15", True), ("v1.2", False), ("1.2.3", False)],
)
def test_a_pushed_tag_of_three_numbers_starts_a_release(events, tag, starts):
    patterns = [pattern.replace(".", r"\.") for pattern in (events["push"] or {}).get("tags") or []]
    started = any(re.fullmatch(pattern, tag) for pattern in patterns)
    assert started == starts, f"the tag {tag} {'starts a' if started else 'starts no'} run"


def test_runs_of_a_branch_wait_for_one_another_and_only_a_pull_request_s_are_cancelled(workflow):
    concurrency = workflow.get("concurrency")
    assert concurrency, "runs of a branch may overlap: the workflow has no concurrency"
    group = str(concurrency.get("group"))
    assert set(re.findall(r"[\w.]+\.\w+", group)) == {"github.ref"}, (
        f"runs of a branch are not in one group, or with those of others: {group}"
    )
    cancelled = concurrency.get("cancel-in-progress", False)
    assert cancelled == "${{ github.event_name == 'pull_request' }}", (
        f"runs that publish may be cancelled halfway: cancel-in-progress is {cancelled}"
    )


def test_a_schedule_switches_off_the_weekly_run_alone_which_may_do_what_it_calls(events, jobs):
    """GitHub switches off the whole file with the schedule; a call that grants too little fails."""
    assert "schedule" not in events, "GitHub will switch off publishing with the schedule"
    weekly = read(".github/workflows/weekly-lab25.yml")
    schedule = weekly[True].get("schedule")
    assert schedule, "nothing is built weekly: no schedule"
    for moment in schedule:
        assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", moment["cron"]), (
            f"the weekly run starts at `{moment['cron']}`, which is not once a week"
        )
    (call,) = weekly["jobs"].values()
    assert call.get("uses") == "./.github/workflows/docker-image-lab25.yml", (
        f"the weekly run does not call the workflow, but {call.get('uses')}"
    )
    for name, job in jobs.items():
        for scope, access in job["permissions"].items():
            granted = call["permissions"].get(scope)
            assert granted in {access, "write"}, f"weekly: {name} needs {scope}: {access}"


# Before anything is published


def pytest_entries(jobs):
    """Return (job, Python, mark expression) of every run of pytest."""
    entries = []
    for name, job in jobs.items():
        for step in job["steps"]:
            if "pytest" not in step.get("run", ""):
                continue
            assert step.get("env", {}).get("LAB25_ENGINE") == "required", (
                f"tests that find no engine are skipped in green, in the job {name}"
            )
            setup = the_step(jobs, name, "setup-python")["with"]["python-version"]
            for entry in job.get("strategy", {}).get("matrix", {}).get("include", [{}]):
                chosen = re.search(r'pytest -m "?([^"$]+)', step["run"])
                marks = chosen[1] if chosen else entry["tests"]
                entries.append((name, entry.get("python", setup), marks))
    return entries


def selected(expression, marks):
    """Return whether pytest's -m, whose expressions are also Python's, takes these marks."""
    return eval(expression, {mark: mark in marks for mark in ("engine", "slow", "timing")})


KINDS_OF_TESTS = [
    set(marks)
    for count in range(4)
    for marks in itertools.combinations(("engine", "slow", "timing"), count)
]


@pytest.mark.parametrize("marks", KINDS_OF_TESTS, ids=lambda marks: "-".join(sorted(marks)) or "-")
def test_every_kind_of_test_is_run_and_a_limit_in_seconds_holds_nothing_back(jobs, marks):
    on_a_push = {name for name, _, chosen in pytest_entries(jobs) if selected(chosen, marks)}
    assert on_a_push, f"no job runs the tests marked {marks or 'not at all'}"
    on_a_pull_request = on_a_push & set(started_by_a_pull_request(jobs))
    quick = not marks & {"slow", "timing"}
    assert bool(on_a_pull_request) == quick, (
        f"tests marked {marks or 'not at all'} are run on a pull request by {on_a_pull_request}"
    )
    holds_back = on_a_push & waits_for(jobs, "build")
    assert bool(holds_back) == ("timing" not in marks), (
        f"what is built waits for tests marked {marks or 'not at all'} in {holds_back or 'no job'}"
    )


def test_tests_run_on_the_oldest_and_newest_python_and_with_an_engine_on_the_image_s(jobs):
    entries = pytest_entries(jobs)
    without = {python for _, python, chosen in entries if selected(chosen, set())}
    assert {"3.11", "3.14"} <= without, f"without an engine, tests run on {sorted(without)} only"
    dockerfile = (REPOSITORY / "labs/lesson_25/app/Dockerfile").read_text(encoding="utf-8")
    (image_python,) = set(re.findall(r"^FROM python:([\d.]+)", dockerfile, re.M))
    with_one = {python for _, python, chosen in entries if selected(chosen, {"engine"})}
    assert with_one == {image_python}, f"the engine's tests run on {sorted(with_one)}"


def test_nothing_is_built_before_the_linters_and_tests_and_nothing_goes_on_after_a_failure(jobs):
    the_step(jobs, "lint", ".ci/lint")
    missing = {"plan", "lint", "test", "swarm"} - waits_for(jobs, "build")
    assert not missing, f"an image is pushed without waiting for {sorted(missing)}"
    going_on = re.search(r"always\(\)|failure\(\)|cancelled\(\)|continue-on-error", str(jobs))
    assert not going_on, f"a failing step does not stop what comes after it: {going_on[0]}"


def test_a_script_ends_with_its_first_failing_command_also_in_a_pipe(workflow, jobs):
    shell = workflow.get("defaults", {}).get("run", {}).get("shell")
    assert shell == "bash", f"without `shell: bash` GitHub sets no pipefail; the shell is {shell}"
    for name, step in all_steps(jobs):
        assert "shell" not in step, f"a step of {name} has a shell of its own: {step['shell']}"


# The build


@pytest.mark.parametrize("job", ["build", "build-only"])
def test_builds_for_both_platforms_on_the_newest_base(workflow, jobs, job):
    build = the_step(jobs, job, "build-push-action").get("with", {})
    assert build.get("context") == "labs/lesson_25/app", f"{job} builds {build.get('context')}"
    assert build.get("pull") is True, f"{job} may keep an old base image: pull is not true"
    assert build.get("platforms") == "${{ env.PLATFORMS }}", f"{job}: {build.get('platforms')}"
    platforms = workflow.get("env", {}).get("PLATFORMS")
    assert platforms == "${{ vars.PLATFORMS || 'linux/amd64,linux/arm64' }}", (
        f"the image is not for linux/amd64 and linux/arm64: PLATFORMS is {platforms}"
    )


@pytest.mark.parametrize(
    ("option", "promise"),
    [
        ("provenance", "mode=max"),
        ("sbom", "generator={0}"),
        ("cache-to", "ignore-error=true"),
        ("labels", "image.revision=${{ github.sha }}"),
        ("labels", "image.source="),
        ("annotations", "index:org.opencontainers.image.title=lab25-web"),
        ("annotations", "index:org.opencontainers.image.description="),
        ("annotations", "index:org.opencontainers.image.source="),
        ("build-args", "BUILD_VERSION=${{ needs.plan.outputs.version }}"),
        ("build-args", "BUILD_DATE=${{ steps.date.outputs.date }}"),
    ],
)
def test_the_published_image_says_what_it_is_and_how_it_was_built(jobs, option, promise):
    build = the_step(jobs, "build", "build-push-action").get("with", {})
    assert promise in str(build.get(option)), (
        f"the build has no {promise}: {option} is {build.get(option)}"
    )


def test_the_dockerfile_s_own_labels_are_not_replaced(jobs):
    labels = the_step(jobs, "build", "build-push-action")["with"]["labels"]
    replaced = re.findall(r"image\.(?:version|created|title)\b", labels)
    assert not replaced, f"the workflow overrides the labels {replaced}"


def test_the_build_s_date_is_a_time_that_the_next_jobs_get(jobs, tmp_path):
    outputs = tmp_path / "outputs"
    run = the_step(jobs, "build", "date --utc")["run"]
    run_script(run, GITHUB_OUTPUT=str(outputs))
    assert re.fullmatch(r"date=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n", outputs.read_text()), (
        f"BUILD_DATE is no date: {outputs.read_text()}"
    )
    handed = jobs["build"].get("outputs", {}).get("date")
    assert handed == "${{ steps.date.outputs.date }}", f"what is tried has another date: {handed}"


# The try


def run_script(script, fakes="", **environment):
    """Run a step's script as GitHub's runner does; return its CompletedProcess."""
    path = os.pathsep.join([str(fakes), os.environ["PATH"]] if fakes else [os.environ["PATH"]])
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(
        command, env={"PATH": path, **environment}, capture_output=True, text=True, timeout=60
    )


def stand_in(folder, name, script):
    """Make a command of this name. It is a shell's script, which starts ten times faster."""
    command = folder / name
    command.write_text(f"#!/bin/sh\n{script}", encoding="utf-8")
    command.chmod(0o755)


DOCKER_IN_THE_TRY = """
echo "$*" >>"$CALLS"
case " $* " in
    *" $FAILS "*) exit 1 ;;
esac
"""

CURL_IN_THE_TRY = """
case "$*" in
    */health) answer=$HEALTH ;;
    *) answer=$HIT ;;
esac
[ "$answer" ] || exit 22
printf '%s\\n' "$answer"
"""


@pytest.fixture
def deploy(jobs, tmp_path):
    """The script that tries the image: call it with what docker's and curl's stand-ins answer."""
    if not shutil.which("jq"):
        pytest.skip("jq, which GitHub's machines have, is not on this one")
    stand_in(tmp_path, "sleep", "")
    stand_in(tmp_path, "docker", DOCKER_IN_THE_TRY)
    stand_in(tmp_path, "curl", CURL_IN_THE_TRY)
    script = the_step(jobs, "try", "docker compose up")["run"]

    def run(health=None, hit='{"hit_count": 1}', fails="nothing"):
        good = {"version": COMMIT, "build_date": "2025-11-24T08:00:00Z", "redis_ok": True}
        environment = {
            "HEALTH": json.dumps(good | (health or {})),
            "HIT": hit,
            "FAILS": fails,
            "CALLS": str(tmp_path / "calls"),
            "BUILD_VERSION": good["version"],
            "BUILD_DATE": good["build_date"],
            "GITHUB_REPOSITORY_OWNER": "Some-Capitals",
        }
        result = run_script(f"cd {tmp_path}\n{script}", tmp_path, **environment)
        return result, (tmp_path / "calls").read_text()

    return run


def test_an_image_that_answers_with_its_version_and_counts_a_hit_is_taken_for_good(deploy):
    result, calls = deploy()
    assert result.returncode == 0, f"a good image gets no name: {result.stdout}{result.stderr}"
    assert calls.endswith("compose down --volumes\n"), f"the try leaves its stack behind: {calls}"


@pytest.mark.parametrize(
    ("what", "answers"),
    [
        ("shows another version", {"health": {"version": COMMIT[:7]}}),
        ("shows another date", {"health": {"build_date": "unknown"}}),
        ("has no Redis", {"health": {"redis_ok": False}}),
        ("counts no hit", {"hit": '{"hit_count": null}'}),
        ("goes on counting of another one", {"hit": '{"hit_count": 7}'}),
        ("fails on /", {"hit": ""}),
        ("does not start", {"fails": "up"}),
    ],
)
def test_no_image_gets_a_name_that(deploy, what, answers):
    result, calls = deploy(**answers)
    assert result.returncode != 0, f"an image that {what} passes the try"
    assert "compose logs" in calls, f"the log of an image that {what} is not shown"


def test_an_image_that_the_registry_does_not_know_yet_is_pulled_again(deploy):
    result, calls = deploy(fails="pull")
    assert calls.count("compose pull") > 1, f"a pull is tried once only: {calls}"
    assert "compose up" in calls, f"after failing pulls it is not deployed: {result.stderr}"


def test_every_platform_is_tried_from_the_registry_on_a_machine_of_its_own_kind(jobs):
    job = jobs.get("try", {})
    platforms = job.get("strategy", {}).get("matrix", {}).get("platform")
    assert platforms == "${{ fromJSON(needs.plan.outputs.platforms) }}", (
        f"not every platform is tried: {platforms}"
    )
    machine = job.get("runs-on")
    expected = "${{ matrix.platform == 'linux/arm64' && 'ubuntu-24.04-arm' || 'ubuntu-24.04' }}"
    assert machine == expected, f"linux/arm64 is not tried on an arm64 machine: {machine}"
    environment = the_step(jobs, "try", "docker compose up").get("env", {})
    deployed = environment.get("COMPOSE_FILE")
    assert deployed == "labs/lesson_25/compose/docker-compose.registry.yml", (
        f"what is tried is not the registry file alone: {deployed}"
    )
    tag = environment.get("IMAGE_TAG")
    assert tag == "run-${{ github.run_id }}@${{ needs.build.outputs.digest }}", (
        f"what is tried is not the very image that was pushed: {tag}"
    )
    told = {name: environment.get(name) for name in ("BUILD_VERSION", "BUILD_DATE")}
    assert told == {
        "BUILD_VERSION": "${{ needs.plan.outputs.version }}",
        "BUILD_DATE": "${{ needs.build.outputs.date }}",
    }, f"/health is compared with {told}"


# The names


def test_what_is_pushed_is_what_the_registry_file_pulls():
    file = read("labs/lesson_25/compose/docker-compose.registry.yml")
    pulled = file["services"]["web"]["image"]
    assert pulled.endswith("/lab25-web:${IMAGE_TAG:-dev}"), f"no image is published as {pulled}"


def test_tags_move_only_after_the_published_image_has_run(jobs):
    pushed = the_step(jobs, "build", "build-push-action").get("with", {}).get("tags")
    assert pushed == "${{ needs.plan.outputs.image }}:run-${{ github.run_id }}", (
        f"the build pushes under a name that somebody may deploy by: {pushed}"
    )
    for name, step in all_steps(jobs):
        moves = re.search(r"publish\.py name|imagetools create|docker push", step.get("run", ""))
        assert not moves or name == "name", f"the job {name} moves names: {moves[0]}"
    missing = {"build", "try"} - waits_for(jobs, "name")
    assert not missing, f"names move before {sorted(missing)} is green"


def test_the_very_digest_that_was_pushed_and_tried_is_named(jobs):
    handed = jobs.get("build", {}).get("outputs", {}).get("digest")
    assert handed == "${{ steps.build.outputs.digest }}", f"the digest handed on is {handed}"
    assert the_step(jobs, "build", "build-push-action").get("id") == "build", "no step is `build`"
    environment = the_step(jobs, "name", "publish.py name").get("env", {})
    named = environment.get("DIGEST")
    assert named == "${{ needs.build.outputs.digest }}", f"what is named is another image: {named}"


# GitHub's answer is in the file `github/PATH.json`. If there is a file `fault`, it fails once.
GH = """
here=${0%/*}
if rm "$here/fault" 2>/dev/null; then
    echo 'gh: HTTP 502' >&2
    exit 1
fi
[ "$1" = api ] && cat "$here/github/${2%%[?]*}.json"
"""

# What a name leads to, or what the registry says instead, is in the file `registry/NAME`. Which
# names were moved, and where to, is written to the file `moved`.
DOCKER_AT_THE_REGISTRY = """
here=${0%/*}
if [ "$3" = create ]; then
    shift 3
    echo "$*" >>"$here/moved"
    exit
fi
for name; do :; done
answer=$(cat "$here/registry/$name" 2>/dev/null || echo 'ERROR: not found')
case $answer in
    sha256:*) echo "{\\"digest\\": \\"$answer\\"}" ;;
    *) echo "$answer" >&2; exit 1 ;;
esac
"""


class Outside:
    """Stand-ins of GitHub and of the registry, and the rules of the names asking them."""

    def __init__(self, folder, monkeypatch, capfd):
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.capfd = capfd
        self.github = {}
        self.registry = {}  # what each name leads to, or what the registry says instead
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        stand_in(folder, "gh", GH)
        stand_in(folder, "docker", DOCKER_AT_THE_REGISTRY)

    def github_says(self, answer, path=""):
        self.github[f"repos/Some-Capitals/orders{path}"] = answer

    def github_has(self, beginning, refs):
        """Let GitHub know these refs, and no others that begin so."""
        listed = [{"ref": ref, "object": {"sha": commit}} for ref, commit in refs.items()]
        self.github_says(listed, f"/git/matching-refs/{beginning}")

    def run(self, command, ref, **environment):
        """Run the rules for heads/main or tags/v1.2.3; return a CompletedProcess."""
        github = {f"{path}.json": json.dumps(answer) for path, answer in self.github.items()}
        write_files(self.folder / "github", github)
        write_files(self.folder / "registry", self.registry)
        kind, _, name = ref.partition("/")
        environment = {
            "PATH": os.pathsep.join([str(self.folder), os.environ["PATH"]]),
            "GITHUB_OUTPUT": str(self.folder / "outputs"),
            "GITHUB_REPOSITORY": "Some-Capitals/orders",
            "GITHUB_REPOSITORY_OWNER": "Some-Capitals",
            "GITHUB_REF_TYPE": {"heads": "branch", "pull": "branch", "tags": "tag"}[kind],
            "GITHUB_REF_NAME": name,
            "GITHUB_SHA": COMMIT,
            "PLATFORMS": "linux/amd64,linux/arm64",
            "IMAGE": IMAGE,
            "DIGEST": DIGEST,
            "DEFAULT_BRANCH": "main",
            **environment,
        }
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(RULES), command])
            for variable, value in environment.items():
                patch.setenv(variable, value)
            try:
                runpy.run_path(str(RULES), run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code
        return subprocess.CompletedProcess(command, status, *self.capfd.readouterr())

    @property
    def moved(self):
        """The names that were moved; fail where they lead to anything but the digest tried."""
        file = self.folder / "moved"
        if not file.exists():
            return set()
        *tags, target = file.read_text().split()
        assert target == f"{IMAGE}@{DIGEST}", f"names lead to {target} instead of what was tried"
        return {tag.removeprefix(f"--tag={IMAGE}:") for tag in tags}


def write_files(folder, texts):
    """Make a folder with these texts, and nothing else in it; each is named by its path."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in texts.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


@pytest.fixture
def outside(tmp_path, monkeypatch, capfd):
    """GitHub with a public repository whose branch main is at COMMIT, and an empty registry."""
    made = Outside(tmp_path, monkeypatch, capfd)
    made.github_says({"default_branch": "main", "private": False})
    made.github_has("heads/main", {"refs/heads/main": COMMIT})
    return made


def test_main_s_newest_commit_moves_all_names_of_main(outside):
    result = outside.run("name", "heads/main")
    assert outside.moved == {"sha-0a1b2c3", "main", "latest", "dev"}, (
        f"a push to main names its image {outside.moved}: {result.stdout}{result.stderr}"
    )


def test_an_older_run_started_again_names_its_commit_alone_and_says_why(outside):
    outside.github_has("heads/main", {"refs/heads/main": NEWER_COMMIT})
    result = outside.run("name", "heads/main")
    assert outside.moved == {"sha-0a1b2c3"}, f"an older run moves {outside.moved}"
    assert "0a1b2c3 is not the newest of main, which is 4d5e6f7 now" in result.stdout, (
        f"an older run does not say why main stays: {result.stdout}"
    )


@pytest.mark.parametrize(
    ("branch", "own"),
    [
        ("topic", {"topic"}),
        ("topic/1", {"topic-1"}),
        ("Feature_X.2", {"Feature_X.2"}),
        ("v1.2.3", {"v1.2.3"}),
        ("#12-fix", set()),
        ("fix#12", set()),
        ("run/123", set()),
        ("sha-0a1b2c3", set()),
        ("latest", set()),
        ("dev", set()),
        ("1.2", set()),
        ("-x", set()),
        ("größer", set()),
        ("x" * 128, {"x" * 128}),
        ("x" * 200, set()),
    ],
)
def test_another_branch_names_its_own_image_where_an_image_can_be_called_so(outside, branch, own):
    """The run goes on all the same, and the commit has its name."""
    outside.github_says({"status": "ahead"}, f"/compare/main...{COMMIT}")
    outside.github_has(f"heads/{branch.replace('/', '-')}", {})
    outside.github_has(f"heads/{branch}", {f"refs/heads/{branch}": COMMIT})
    result = outside.run("name", f"heads/{branch}")
    assert result.returncode == 0, f"{branch} makes the run fail: {result.stdout}{result.stderr}"
    assert outside.moved == {"sha-0a1b2c3", *own}, f"{branch} moves {outside.moved}"
    assert own or f"{branch} gets no name of its own" in result.stdout, (
        f"nothing says why {branch} has no name: {result.stdout}"
    )


def test_two_branches_that_would_be_called_alike_do_not_share_a_name(outside):
    outside.github_says({"status": "ahead"}, f"/compare/main...{COMMIT}")
    outside.github_has("heads/topic-1", {"refs/heads/topic-1": NEWER_COMMIT})
    outside.run("name", "heads/topic/1")
    assert outside.moved == {"sha-0a1b2c3"}, f"topic/1 moves {outside.moved}"


@pytest.mark.parametrize("status", ["identical", "behind"])
def test_another_branch_at_a_commit_of_main_leaves_main_s_names_alone(outside, status):
    outside.github_says({"status": status}, f"/compare/main...{COMMIT}")
    outside.github_has("heads/topic", {"refs/heads/topic": COMMIT})
    result = outside.run("name", "heads/topic")
    assert outside.moved == {"topic"}, f"a branch at main's commit moves {outside.moved}"
    assert "main has this commit too" in result.stdout, f"nothing says why: {result.stdout}"


def test_a_branch_that_begins_like_another_or_is_gone_does_not_move_it(outside):
    outside.github_has("heads/main", {"refs/heads/main-2": COMMIT})
    result = outside.run("name", "heads/main")
    assert outside.moved == {"sha-0a1b2c3"}, f"without a branch main there move {outside.moved}"
    assert "which is gone" in result.stdout, f"nothing says why: {result.stdout}"


def test_the_default_branch_moves_latest_and_dev_however_it_is_called(outside):
    outside.github_has("heads/%23trunk", {"refs/heads/#trunk": COMMIT})
    outside.run("name", "heads/#trunk", DEFAULT_BRANCH="#trunk")
    assert outside.moved == {"sha-0a1b2c3", "latest", "dev"}, f"#trunk moves {outside.moved}"


@pytest.mark.parametrize(
    ("tag", "others", "names"),
    [
        ("v1.2.3", [], {"1.2.3", "1.2"}),
        ("v1.2.10", ["v1.2.9"], {"1.2.10", "1.2"}),
        ("v1.2.9", ["v1.2.10"], {"1.2.9"}),
        ("v1.2.9", ["v1.2.010", "v1.2.11-rc1", "v1.2.", "v1.2.x"], {"1.2.9", "1.2"}),
        ("v0.1.0", [], {"0.1.0", "0.1"}),
    ],
)
def test_a_release_moves_its_line_only_where_it_is_the_highest_by_number(
    outside, tag, others, names
):
    line = tag.rpartition(".")[0]
    outside.github_has(f"tags/{line}.", {f"refs/tags/{name}": COMMIT for name in [tag, *others]})
    result = outside.run("name", f"tags/{tag}")
    assert outside.moved == names, f"{tag} beside {others} moves {outside.moved}: {result.stdout}"


def test_a_release_whose_tag_is_gone_does_not_move_its_line(outside):
    outside.github_has("tags/v1.2.", {"refs/tags/v1.2.2": COMMIT})
    outside.run("name", "tags/v1.2.3")
    assert outside.moved == {"1.2.3"}, f"a release without its tag moves {outside.moved}"


def test_a_release_s_own_name_is_given_once(outside):
    outside.github_has("tags/v1.2.", {"refs/tags/v1.2.3": COMMIT})
    outside.registry[f"{IMAGE}:1.2.3"] = OTHER_DIGEST
    result = outside.run("name", "tags/v1.2.3")
    assert result.returncode != 0, f"1.2.3 is given twice: {outside.moved}"
    assert outside.moved == set(), f"1.2.3 was there already, and these move: {outside.moved}"
    assert "1.2.3 is published already" in result.stdout, f"nothing says why: {result.stdout}"


def test_a_release_that_was_named_halfway_is_named_when_started_again(outside):
    outside.github_has("tags/v1.2.", {"refs/tags/v1.2.3": COMMIT})
    outside.registry[f"{IMAGE}:1.2.3"] = DIGEST
    outside.run("name", "tags/v1.2.3")
    assert outside.moved == {"1.2.3", "1.2"}, f"its own image is refused: {outside.moved}"


@pytest.mark.parametrize(
    ("answer", "stops"),
    [(OTHER_DIGEST, True), ("ERROR: not found", False), ("ERROR: denied", False)],
)
def test_a_published_release_is_not_built_again(jobs, outside, answer, stops):
    """A package that does not exist yet is `denied` or `not found`."""
    outside.registry[f"{IMAGE}:1.2.3"] = answer
    result = outside.run("unpublished", "tags/v1.2.3")
    assert (result.returncode != 0) == stops, (
        f"a release is {'built again' if stops else 'refused'} where the registry says {answer}"
    )
    assert not stops or "1.2.3 is published already" in result.stdout, (
        f"nothing says why a release is not built again: {result.stdout}"
    )
    asked = the_step(jobs, "build", "publish.py unpublished")
    assert asked.get("if") == "github.ref_type == 'tag'", f"asked only if {asked.get('if')}"
    steps = jobs["build"]["steps"]
    build = the_step(jobs, "build", "build-push-action")
    assert steps.index(asked) < steps.index(build), "a release is built before that is asked"


@pytest.mark.parametrize("ref", ["heads/main", "heads/topic", "heads/to/pic", "tags/v1.2.3"])
def test_no_name_moves_while_github_does_not_answer(outside, ref):
    outside.github.clear()
    result = outside.run("name", ref)
    assert result.returncode != 0, f"{ref} is named without an answer: {outside.moved}"
    assert outside.moved == set(), f"{ref} moves {outside.moved} without an answer"
    assert "GitHub did not answer" in result.stdout, f"nothing says why: {result.stdout}"


def test_a_passing_fault_of_github_is_asked_again(outside):
    (outside.folder / "fault").touch()  # gh's stand-in fails once
    result = outside.run("name", "heads/main")
    assert "main" in outside.moved, f"one 502 makes the run red: {result.stdout}{result.stderr}"


def test_no_release_is_named_while_the_registry_does_not_say_whether_it_has_it(outside):
    outside.github_has("tags/v1.2.", {"refs/tags/v1.2.3": COMMIT})
    outside.registry[f"{IMAGE}:1.2.3"] = "ERROR: 503 Service Unavailable"
    result = outside.run("name", "tags/v1.2.3")
    assert result.returncode != 0, "a release is named twice while the registry is away"
    assert outside.moved == set(), f"while the registry is away move {outside.moved}"
    assert "503 Service Unavailable" in result.stdout, f"nothing says why: {result.stdout}"


# The start


def outputs_of_plan(outside, ref, **environment):
    """Return what the other jobs are told; fail where the run is refused."""
    result = outside.run("plan", ref, **environment)
    assert result.returncode == 0, f"{ref} is refused: {result.stdout}{result.stderr}"
    lines = (outside.folder / "outputs").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("tag", ["v2026.01.15", "v01.2.3", "v1.2.3-rc1", "v1.2", "nightly"])
def test_a_tag_that_is_no_release_is_refused_at_the_start_in_words(outside, tag):
    result = outside.run("plan", f"tags/{tag}")
    assert result.returncode != 0, f"the tag {tag} goes on: its image would have no name"
    assert f"::error::The tag {tag} is no release" in result.stdout, (
        f"the tag {tag} is refused without words: {result.stdout}{result.stderr}"
    )


def test_the_version_is_the_commit_or_the_release(outside):
    assert outputs_of_plan(outside, "heads/main")["version"] == COMMIT, "not the branch's commit"
    merged = outputs_of_plan(outside, "pull/1/merge", GITHUB_REF_TYPE="")[
        "version"
    ]  # as act has it
    assert merged == COMMIT, f"a pull request is built as version {merged}"
    version = outputs_of_plan(outside, "tags/v1.2.3")["version"]
    assert version == "1.2.3", f"a release shows the version {version}"


def test_the_image_is_named_after_its_owner_in_lower_case(outside):
    image = outputs_of_plan(outside, "heads/main")["image"]
    assert image == IMAGE, f"a registry takes no capitals, and the image is {image}"


@pytest.mark.parametrize(
    ("platforms", "listed"),
    [
        ("linux/amd64,linux/arm64", ["linux/amd64", "linux/arm64"]),
        ("linux/amd64, linux/arm64", ["linux/amd64", "linux/arm64"]),
        ("linux/amd64", ["linux/amd64"]),
        ("linux/arm64", ["linux/arm64"]),
    ],
)
def test_every_platform_that_is_built_is_tried(outside, platforms, listed):
    told = outputs_of_plan(outside, "heads/main", PLATFORMS=platforms)["platforms"]
    assert json.loads(told) == listed, f"of {platforms} are tried {told}"


@pytest.mark.parametrize(
    ("platforms", "cause"),
    [
        ("linux/amd64,linux/arm/v7", "not all packages have wheels for linux/arm/v7"),
        ("linux/386", "not all packages have wheels for linux/386"),
        ("windows/amd64", "there is no machine to try 'windows/amd64' on"),
        ("linux/amd64,", "there is no machine to try '' on"),
    ],
)
def test_platforms_that_cannot_be_published_are_refused_at_the_start(outside, platforms, cause):
    result = outside.run("plan", "heads/main", PLATFORMS=platforms)
    assert result.returncode != 0, f"PLATFORMS={platforms} goes on"
    assert f"::error::PLATFORMS is '{platforms}': {cause}" in result.stdout, (
        f"PLATFORMS={platforms} is refused without its cause: {result.stdout}{result.stderr}"
    )


def test_the_other_jobs_get_what_is_settled_at_the_start(jobs, outside):
    settled = outputs_of_plan(outside, "heads/main")
    assert settled["default_branch"] == "main", f"latest follows {settled['default_branch']}"
    handed = jobs.get("plan", {}).get("outputs", {})
    expected = {name: f"${{{{ steps.plan.outputs.{name} }}}}" for name in settled}
    assert handed == expected, f"the job plan settles {sorted(settled)} and hands on {handed}"


@pytest.mark.parametrize(
    ("job", "command", "told"),
    [
        ("plan", "plan", {"GH_TOKEN": "${{ github.token }}"}),
        ("build", "unpublished", {"IMAGE": "${{ needs.plan.outputs.image }}"}),
        (
            "name",
            "name",
            {
                "GH_TOKEN": "${{ github.token }}",
                "IMAGE": "${{ needs.plan.outputs.image }}",
                "DIGEST": "${{ needs.build.outputs.digest }}",
                "DEFAULT_BRANCH": "${{ needs.plan.outputs.default_branch }}",
            },
        ),
    ],
)
def test_the_rules_are_told_what_they_go_by(jobs, job, command, told):
    step = the_step(jobs, job, f"publish.py {command}")
    assert step.get("env") == told, f"`publish.py {command}` is told {step.get('env')}"
    missing = {"plan", "build"} & set(re.findall(r"needs\.(\w+)\.", str(step)))
    missing -= waits_for(jobs, job)
    assert not missing, f"the job {job} reads what {missing} settles without waiting for it"


# The signature


@pytest.mark.parametrize("private", [True, False])
def test_only_a_public_repository_s_image_is_signed(jobs, outside, private):
    outside.github_says({"default_branch": "main", "private": private})
    told = outputs_of_plan(outside, "heads/main")["private"]
    assert told == str(private).lower(), f"a repository with private={private} is taken for {told}"
    condition = jobs.get("attest", {}).get("if")
    assert condition == "needs.plan.outputs.private == 'false'", f"signed if {condition}"


def test_what_is_signed_is_the_digest_that_was_named_and_a_stranger_s_check_comes_last(jobs):
    assert "name" in waits_for(jobs, "attest"), "a failing signature holds back the names"
    signed = the_step(jobs, "attest", "actions/attest").get("with", {})
    assert signed == {
        "subject-name": "${{ needs.plan.outputs.image }}",
        "subject-digest": "${{ needs.build.outputs.digest }}",
    }, f"what is signed is not the very image: {signed}"
    check = the_step(jobs, "attest", "gh attestation verify")
    assert jobs["attest"]["steps"][-1] == check, "something follows the check of the signature"
    checked = check["env"].get("IMAGE")
    assert checked == "${{ needs.plan.outputs.image }}@${{ needs.build.outputs.digest }}", (
        f"the signature of another image is checked: {checked}"
    )
    assert '--repo "$GITHUB_REPOSITORY"' in check["run"], f"of any repository: {check['run']}"


# Dependabot


def test_dependabot_watches_the_actions_and_every_list_of_packages():
    updates = read(".github/dependabot.yml")["updates"]
    watched = {
        (update["package-ecosystem"], folder)
        for update in updates
        for folder in update.get("directories", [update.get("directory")])
    }
    lists = [
        *REPOSITORY.glob("labs/lesson_25/*/requirements.in"),
        *REPOSITORY.glob(".ci/requirements.in"),
    ]
    folders = [file.parent.relative_to(REPOSITORY).as_posix() for file in lists]
    expected = {("github-actions", "/")} | {("uv", f"/{folder}") for folder in folders}
    assert watched == expected, (
        f"without updates: {expected - watched}; nothing to update: {watched - expected}"
    )


def test_a_release_of_others_is_taken_a_week_later():
    """A bad one is mostly found within days."""
    for update in read(".github/dependabot.yml")["updates"]:
        days = update.get("cooldown", {}).get("default-days", 0)
        assert days >= 7, (
            f"Dependabot proposes a release of {update['package-ecosystem']} after {days} days"
        )


def test_the_tests_packages_are_updated_with_the_app_s():
    updates = read(".github/dependabot.yml")["updates"]
    together = [set(update.get("directories", [])) for update in updates]
    assert {"/labs/lesson_25/app", "/labs/lesson_25/tests"} in together, (
        f"the tests run with the app's versions, and are updated apart: {together}"
    )
