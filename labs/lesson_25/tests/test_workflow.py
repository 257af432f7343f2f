"""What the workflow publishes, and when. What a linter reports is not tested again."""

import re
import shutil
import sys

import pytest

from harness import REPOSITORY
from harness.actions import (
    COMMIT,
    DIGEST,
    IMAGE,
    JOBS,
    NEWER_COMMIT,
    WORKFLOW,
    Run,
    evaluate,
    read,
    render,
)

SHA_TAG = "sha-0a1b2c3"


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
def test_branch_moves_its_tag_if_valid_and_free(run, branch, own):
    done = run(event="workflow_dispatch", ref=f"refs/heads/{branch}")
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
def test_tag_without_release_number_is_not_built(run, tag):
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
def test_faulty_image_gets_no_tag(run, fault):
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
    deployed = read(file)["services"]["web"]["image"]
    assert deployed.endswith("/lab25-web:${IMAGE_TAG:-dev}")


@pytest.mark.parametrize(
    ("platforms", "runners"),
    [("", ["ubuntu-24.04", "ubuntu-24.04-arm"]), ("linux/arm64", ["ubuntu-24.04-arm"])],
)
def test_every_platform_is_tried_on_its_own_runner(run, platforms, runners):
    job, known = JOBS["try"], run(platforms=platforms).known
    tried = evaluate(job["strategy"]["matrix"]["platform"][3:-2], known)
    assert [evaluate(job["runs-on"][3:-2], {"matrix.platform": name}) for name in tried] == runners


# Facts that only these tests guard, beside the rows in test_files.py


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


def test_linters_and_image_python_are_used():
    dockerfile = (REPOSITORY / "labs/lesson_25/app/Dockerfile").read_text(encoding="utf-8")
    image_python = re.search(r"^FROM python:([\d.]+)", dockerfile, re.M)[1]
    assert JOBS["test"]["strategy"]["matrix"]["python"][-1] == image_python
    assert ".ci/lint" in str(JOBS["test"]["steps"])


def test_merge_queue_starts_run():
    """A queue waits indefinitely for a required check that does not report."""
    assert "merge_group" in WORKFLOW[True]  # YAML 1.1 reads the key `on` as true


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
