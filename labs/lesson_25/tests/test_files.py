"""What the files promise to each other: two Compose files, two lists of packages, one workflow, one Dependabot file."""

import re
import subprocess

import pytest
import yaml

from engine import LESSON

REPOSITORY = LESSON.parents[1]
WORKFLOW_FILE = ".github/workflows/docker-image-lab25.yml"


def read(path):
    return yaml.safe_load((REPOSITORY / path).read_text())


@pytest.fixture
def workflow():
    content = read(WORKFLOW_FILE)
    content["on"] = content.pop(True)  # YAML 1.1 reads the key `on` as true
    return content


@pytest.fixture
def publish_steps(workflow):
    return workflow["jobs"]["publish"]["steps"]


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def place_of(steps, words):
    """Return which of the steps mentions all these words; fail unless one does."""
    (place,) = [place for place, step in enumerate(steps) if all(word in str(step) for word in words)]
    return place


# Compose


def test_the_two_stacks_agree_but_for_where_the_image_comes_from():
    local = read("labs/lesson_25/compose/docker-compose.yml")
    registry = read("labs/lesson_25/compose/docker-compose.registry.yml")
    assert local["services"]["web"].pop("build") == "../app"
    assert local["services"]["web"].pop("image") == "lab25-web:dev"
    assert local["services"]["web"].pop("develop")["watch"] == [{"action": "rebuild", "path": "../app"}]
    image = "${REGISTRY:-ghcr.io}/${GHCR_OWNER:-vlrrbn}/lab25-web:${IMAGE_TAG:-dev}"
    assert registry["services"]["web"].pop("image") == image
    assert registry["services"]["web"].pop("pull_policy") == "always"
    assert local == registry


def test_the_registry_stack_builds_nothing_and_needs_no_other_file():
    text = (LESSON / "compose" / "docker-compose.registry.yml").read_text()
    assert not re.search(r"build|env_file|extends|include|\.\./|\./", text)


# Packages


def locked(name):
    """Return the packages of a list, with their versions; fail where one has no hash."""
    text = (LESSON / name / "requirements.txt").read_text()
    entries = re.split(r"\n(?=[a-z])", text)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    return dict(re.match(r"([a-z0-9-]+)==(\S+)", entry).groups() for entry in entries)


def test_the_runtime_depends_on_four_packages():
    assert (LESSON / "app" / "requirements.in").read_text().split() == ["flask", "granian", "hiredis", "redis"]


def test_the_tests_run_with_the_versions_that_are_shipped():
    app, tests = locked("app"), locked("tests")
    both = app.keys() & tests.keys()
    assert "redis" in both
    assert {name: app[name] for name in both} == {name: tests[name] for name in both}


def test_nothing_is_added_to_the_top_level():
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert {file.partition("/")[0] for file in files.splitlines()} == {
        *(".ci", ".github", ".gitignore", "README.md", "labs", "lesson_25.md", "pytest.ini")
    }


# The workflow: safety


def test_the_workflow_starts_for_the_lesson_by_hand_and_weekly(workflow):
    paths = {"labs/lesson_25/**", "lesson_25.md", "README.md", "pytest.ini", WORKFLOW_FILE}
    assert set(workflow["on"]) == {"push", "pull_request", "workflow_dispatch", "schedule"}
    assert workflow["on"]["push"] == {"branches": ["main"], "paths": workflow["on"]["pull_request"]["paths"]}
    assert set(workflow["on"]["pull_request"]["paths"]) == paths
    (schedule,) = workflow["on"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \d", schedule["cron"])


def test_only_publishing_may_write_and_only_packages(workflow):
    assert workflow["permissions"] == {}
    permissions = {name: job["permissions"] for name, job in workflow["jobs"].items()}
    assert permissions.pop("publish") == {"contents": "read", "packages": "write"}
    assert all(permission == {"contents": "read"} for permission in permissions.values())


def test_a_pull_request_builds_and_tests_but_cannot_publish(workflow):
    jobs = workflow["jobs"]
    assert jobs["publish"]["if"] == "github.event_name != 'pull_request'"
    assert "if" not in jobs["test"]
    for name in ("test", "build"):
        assert not re.search(r"secrets\.|login-action|push: *true|'push': True|packages", str(jobs[name]))


def test_every_action_is_pinned_and_no_checkout_keeps_a_credential(workflow):
    text = (REPOSITORY / WORKFLOW_FILE).read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use) for use in uses)
    assert len({use.split("@")[0] for use in uses}) == len(set(uses)), "one version of each action"
    checkouts = [step for step in steps_of(workflow) if step.get("uses", "").startswith("actions/checkout")]
    assert len(checkouts) == len(workflow["jobs"])
    assert all(step["with"] == {"persist-credentials": False} for step in checkouts)


def test_no_script_takes_in_an_expression_and_every_job_ends(workflow):
    assert not [step for step in steps_of(workflow) if "${{" in step.get("run", "")]
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


def test_runs_of_a_branch_wait_for_each_other_and_those_of_a_pull_request_do_not(workflow):
    assert workflow["concurrency"] == {
        "group": "${{ github.workflow }}-${{ github.ref }}",
        "cancel-in-progress": "${{ github.event_name == 'pull_request' }}",
    }


# The workflow: what it publishes, and when


def test_every_test_runs_before_anything_is_published(workflow):
    assert workflow["jobs"]["publish"]["needs"] == "test"
    (run,) = [step for step in workflow["jobs"]["test"]["steps"] if "pytest" in step.get("run", "")[:6]]
    assert run == {
        "name": run["name"],
        "run": 'pytest -m "slow or not slow"',
        "env": {"LAB25_ENGINE": "required"},
    }


def test_tags_move_only_after_the_published_image_has_run(publish_steps):
    pushed = place_of(publish_steps, ["build-push-action"])
    deployed = place_of(publish_steps, ["docker-compose.registry.yml", "compose up", "env.GITHUB_SHA", "BUILD_DATE"])
    loaded = place_of(publish_steps, ["docker run", "--platform", "import app"])
    moved = place_of(publish_steps, ["imagetools create"])
    assert pushed < deployed < loaded < moved
    assert publish_steps[pushed]["with"]["tags"] == "${{ steps.commit.outputs.tags }}"
    assert "steps.build.outputs.digest" in publish_steps[deployed]["env"]["IMAGE_TAG"]
    assert "steps.build.outputs.digest" in publish_steps[moved]["env"]["PUBLISHED"]
    assert not [step for step in publish_steps if "always()" in str(step) or "continue-on-error" in step]


def test_what_is_pushed_is_what_the_registry_file_pulls(publish_steps):
    """One image name, and tags that the workflow does make."""
    names = {step["with"]["images"] for step in publish_steps if "metadata-action" in step.get("uses", "")}
    assert names == {"ghcr.io/${{ github.repository_owner }}/lab25-web"}
    assert publish_steps[place_of(publish_steps, ["type=sha"])]["with"]["tags"] == "type=sha"
    moving = publish_steps[place_of(publish_steps, ["type=ref"])]["with"]["tags"].splitlines()
    assert [line.split(",enable=")[0] for line in moving] == [
        "type=ref,event=branch",
        "type=raw,value=latest",
        "type=raw,value=dev",
    ]
    assert [line.split(",enable=")[1] for line in moving[1:]] == ["{{is_default_branch}}"] * 2


def test_builds_for_all_platforms_with_a_version_a_date_and_attestations(workflow, publish_steps):
    inputs = publish_steps[place_of(publish_steps, ["build-push-action"])]["with"]
    assert inputs["platforms"] == "${{ vars.PLATFORMS || 'linux/amd64,linux/arm64' }}"
    (pull_request,) = [step for step in workflow["jobs"]["build"]["steps"] if "build-push" in step.get("uses", "")]
    assert pull_request["with"]["platforms"] == inputs["platforms"]
    assert inputs["build-args"].split() == [
        *("BUILD_VERSION=${{", "github.sha", "}}"),
        *("BUILD_DATE=${{", "steps.date.outputs.now", "}}"),
    ]
    assert {line.split("=")[0] for line in inputs["labels"].splitlines()} == {
        "org.opencontainers.image.revision",
        "org.opencontainers.image.source",
    }
    assert (inputs["provenance"], inputs["sbom"], inputs["push"]) == ("mode=max", True, True)
    assert (inputs["cache-from"], inputs["cache-to"]) == ("type=gha", "type=gha,mode=max")


# Dependabot


def test_dependabot_watches_images_actions_and_packages_within_the_lessons_versions():
    updates = {update["package-ecosystem"]: update for update in read(".github/dependabot.yml")["updates"]}
    assert set(updates) == {"docker", "docker-compose", "github-actions", "uv"}
    assert updates["docker"]["directory"] == "/labs/lesson_25/app"
    assert updates["docker-compose"]["directory"] == "/labs/lesson_25/compose"
    assert set(updates["uv"]["directories"]) == {"/labs/lesson_25/app", "/labs/lesson_25/tests"}
    (python,) = updates["docker"]["ignore"]
    (redis,) = updates["docker-compose"]["ignore"]
    assert (python["dependency-name"], redis["dependency-name"]) == ("python", "redis")
    assert set(python["update-types"]) == {"version-update:semver-major", "version-update:semver-minor"}
    assert set(redis["update-types"]) == {"version-update:semver-major"}
