"""What the workflows and Dependabot's file promise, read as data; their scripts are run."""

import os
import re
import subprocess

import pytest
import yaml

from harness.checklist import REPOSITORY


def read(path):
    return yaml.safe_load((REPOSITORY / path).read_text())


@pytest.fixture
def workflow():
    return read(".github/workflows/docker-image-lab25.yml")


@pytest.fixture
def jobs(workflow):
    return workflow["jobs"]


def run_step(step, **environment):
    """Run a step's script as a runner does. Return its exit status and what it printed, its outputs included."""
    environment |= {"PATH": os.environ["PATH"], "GITHUB_OUTPUT": "/dev/stdout"}
    command = ["bash", "-eo", "pipefail", "-c", step["run"]]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout


def only(steps, *words):
    """Return the place of the one step that mentions all these words; fail unless there is exactly one."""
    (place,) = [
        place for place, step in enumerate(steps) if all(word in str(step) for word in words)
    ]
    return place


# The workflow: what protects those who use it


def writes(job):
    return {scope for scope, access in job["permissions"].items() if access != "read"}


def test_only_publishing_writes_packages_and_only_attesting_signs(workflow, jobs):
    assert workflow["permissions"] == {}
    assert {name: writes(job) for name, job in jobs.items() if writes(job)} == {
        "publish": {"packages"},
        "attest": {"id-token", "attestations"},
    }


def test_a_pull_request_builds_and_tests_but_cannot_publish(jobs):
    started = {
        name: job
        for name, job in jobs.items()
        if job.get("if") != "github.event_name != 'pull_request'"
    }
    assert {"test", "build"} <= set(started)
    for job in started.values():
        assert not writes(job)
        assert not re.search(r"secrets\.|github\.token|login-action|'push': True", str(job))


def test_every_action_is_pinned_to_a_commit_with_its_tag_beside_it():
    """The linters see a missing commit, but not a missing tag, by which Dependabot and people know the version."""
    text = "".join(file.read_text() for file in REPOSITORY.glob(".github/workflows/*"))
    for use in re.findall(r"uses: (?!\./)(.*)", text):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use), use


def test_no_checkout_keeps_a_credential_and_no_script_takes_in_an_expression(jobs):
    for step in [step for job in jobs.values() for step in job["steps"]]:
        assert (
            "checkout" not in step.get("uses", "") or step["with"]["persist-credentials"] is False
        )
        assert "${{" not in step.get("run", "")


def test_a_change_of_whatever_is_tested_starts_the_workflow(workflow):
    tested = {
        "labs/lesson_25/**",
        "lesson_25.md",
        "README.md",
        "pytest.ini",
        ".github/**",
        ".ci/**",
    }
    events = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert tested <= set(events["push"]["paths"])
    assert tested <= set(events["pull_request"]["paths"])


def test_a_schedule_switches_off_the_weekly_run_alone_which_may_do_what_it_calls(workflow, jobs):
    """GitHub switches off a whole workflow with a schedule in it, and refuses a call that grants too little."""
    weekly = read(".github/workflows/weekly-lab25.yml")
    assert "schedule" in weekly[True].keys() - workflow[True].keys()
    (call,) = weekly["jobs"].values()
    for job in jobs.values():
        for scope, access in job["permissions"].items():
            assert call["permissions"].get(scope) in {access, "write"}, scope


# The workflow: what it publishes, and when


def test_tags_move_only_after_the_published_image_has_run(jobs):
    """Before the first push, every linter and test; before a name that anyone deploys by, the image itself."""
    assert (jobs["publish"]["needs"], jobs["attest"]["needs"]) == ("test", "publish")
    checks = jobs["test"]["steps"]
    only(checks, ".ci/lint")
    assert checks[only(checks, "'pytest ")]["env"] == {"LAB25_ENGINE": "required"}
    steps = jobs["publish"]["steps"]
    pushed = only(steps, "build-push-action")
    deployed = only(
        steps,
        "docker-compose.registry.yml",
        "compose up",
        "/health",
        ".version ==",
        ".build_date ==",
    )
    loaded = only(steps, "docker run", "--platform", "import app")
    named = only(steps, "imagetools create")
    assert pushed < deployed < loaded < named
    assert steps[pushed]["with"]["tags"].endswith("}}:run-${{ github.run_id }}")
    for place, name in ((deployed, "IMAGE_TAG"), (named, "DIGEST")):
        assert steps[place]["env"][name].endswith("${{ steps.build.outputs.digest }}")
    assert not re.search(r"always\(\)|failure\(\)|continue-on-error", str(jobs))


def test_what_is_pushed_is_what_the_registry_file_pulls(jobs):
    """One image name, in lower case, with the number of a release; and the tags, of which `dev` is the file's own."""
    steps = jobs["publish"]["steps"]
    facts = steps[only(steps, "GITHUB_OUTPUT")]
    owner = {"GITHUB_REPOSITORY_OWNER": "Some-Capitals", "GITHUB_SHA": "0a1b2c3"}
    for name, branch_tag in {
        "main": "true",
        "topic/1": "true",
        "latest": "false",
        "1.2": "false",
    }.items():
        _, settled = run_step(facts, GITHUB_REF_TYPE="branch", GITHUB_REF_NAME=name, **owner)
        assert {"version=0a1b2c3", f"branch_tag={branch_tag}"} < set(settled.splitlines())
    _, settled = run_step(facts, GITHUB_REF_TYPE="tag", GITHUB_REF_NAME="v1.2.3", **owner)
    assert {"version=1.2.3", "image=ghcr.io/some-capitals/lab25-web"} < set(settled.splitlines())
    pulled = read("labs/lesson_25/compose/docker-compose.registry.yml")["services"]["web"]["image"]
    assert pulled.endswith("/lab25-web:${IMAGE_TAG:-dev}")
    naming = steps[only(steps, "metadata-action")]["with"]
    assert naming["flavor"] == "latest=false", "a release would move latest"
    rules = dict(rule.partition(",enable=")[::2] for rule in naming["tags"].splitlines())
    assert {"type=sha", "type=ref,event=branch", "type=semver,pattern={{version}}"} < set(rules)
    assert rules["type=raw,value=latest"] == rules["type=raw,value=dev"] == "{{is_default_branch}}"


def test_platforms_that_cannot_be_published_are_refused_first(jobs):
    check = jobs["test"]["steps"][0]
    assert run_step(check, PLATFORMS="linux/amd64,linux/arm64") == (0, "")
    for platforms, cause in {
        "linux/amd64,linux/arm/v7": "wheels for",
        "linux/arm64": "linux/amd64 too",
    }.items():
        status, printed = run_step(check, PLATFORMS=platforms)
        assert status != 0
        assert re.search(f"PLATFORMS is '{platforms}': .*{cause}", printed)


# Dependabot


def test_dependabot_watches_the_actions_and_every_list_of_packages():
    updates = read(".github/dependabot.yml")["updates"]
    lists = [*REPOSITORY.glob("labs/**/requirements.in"), *REPOSITORY.glob(".ci/requirements.in")]
    watched = [set(update.get("directories", [update.get("directory")])) for update in updates]
    assert set.union(*watched) == {
        "/",
        *(f"/{file.parent.relative_to(REPOSITORY)}" for file in lists),
    }
    assert {"/labs/lesson_25/app", "/labs/lesson_25/tests"} in watched, (
        "the tests run with the app's versions"
    )
