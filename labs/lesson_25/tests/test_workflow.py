"""Which image the workflow publishes, when, and with which tags.

The workflow's scripts run here with stand-ins for gh, docker and curl. Everything else is read as
data: more of it in test_files.py. What a linter reports is not tested again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from urllib.parse import quote

import pytest
import yaml

from harness import PROJECT, REPOSITORY

FILE = REPOSITORY / ".github/workflows/docker-image-lab25.yml"
WORKFLOW = yaml.safe_load(FILE.read_text())
JOBS = WORKFLOW["jobs"]

IMAGE = "ghcr.io/some-capitals/lab25-web"
DIGEST = f"sha256:{'a' * 64}"
COMMIT, NEWER_COMMIT = "0a1b2c3" + "0" * 33, "4d5e6f7" + "0" * 33
SHA_TAG = "sha-0a1b2c3"
MAIN = "refs/heads/main"


def find(job, text):
    """Return the only step of a job that contains the text, with GitHub's default of `if`."""
    steps = [step for step in JOBS[job]["steps"] if text in str(step)]
    assert len(steps) == 1, f"{job} must have one step with {text!r}, got {len(steps)}"
    return {"if": True, **steps[0]}


def evaluate(expression, known):
    """Return the value of a workflow's expression, which is Python apart from its operators."""
    python = str(expression).strip("${ }").replace("&&", "and").replace("||", "or")
    for name, value in known.items():
        python = python.replace(name, repr(value))
    names = {"contains": lambda items, item: item in items, "fromJSON": json.loads, "true": True}
    return eval(python, names)


@pytest.fixture
def run(tmp_path):
    """A function that runs a step's script, with programs that are replaced by shell commands."""
    if sys.platform != "linux" or not shutil.which("jq"):
        pytest.skip("the scripts need what GitHub's runners have: Linux and jq")

    def run_script(step, ref=MAIN, variables=None, **programs):
        for name, commands in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{commands}\n")
            (tmp_path / name).chmod(0o755)
        file = tmp_path / "outputs"
        file.write_text("")
        environment = {
            "GITHUB_OUTPUT": str(file),
            "GITHUB_REF": ref,
            "GITHUB_REF_NAME": ref.split("/", 2)[2],
            "GITHUB_REF_TYPE": "tag" if ref.startswith("refs/tags/") else "branch",
            "GITHUB_REPOSITORY": "Some-Capitals/orders",
            "GITHUB_REPOSITORY_OWNER": "Some-Capitals",
            "GITHUB_SHA": COMMIT,
            "IMAGE": IMAGE,
            "DIGEST": DIGEST,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        }
        done = subprocess.run(
            ["bash", "--norc", "-eo", "pipefail", "-c", step["run"]],
            env=environment | (variables or {}),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout)
        done.outputs = dict(re.findall(r"(\w+)=(.*)", file.read_text()))
        return done

    return run_script


# Which tags an image gets

PUBLISHED = "exit 0"
NOT_FOUND = 'echo "ERROR: $4: not found"; exit 1'
GH = r"""jq -nr --arg path "$2" "(env.ANSWERS | fromjson)[\$path] // error(\"HTTP 502\") | $4" """


@pytest.fixture
def decide(run):
    """A function that runs the script that decides about tags, and adds which tags result."""

    def run_decision(ref=MAIN, head=COMMIT, releases=(), private=False, **programs):
        name = ref.split("/", 2)[2]
        api = "repos/Some-Capitals/orders"
        answers = {
            api: {"default_branch": "main", "private": private},
            f"{api}/branches/{quote(name, safe='')}": {"commit": {"sha": head}},
            f"{api}/git/matching-refs/tags/{name.rpartition('.')[0]}.": [
                {"ref": f"refs/tags/{release}"} for release in releases
            ],
        }
        programs = {"gh": GH, "docker": NOT_FOUND} | programs
        variables = {"ANSWERS": json.dumps(answers)}
        done = run(find("publish", "matching-refs"), ref, variables, **programs)
        done.tags = set() if done.returncode else list_tags(ref, done.outputs)
        return done

    return run_decision


def list_tags(ref, outputs):
    """Return the tags that docker/metadata-action lists after a decision."""
    inputs = find("publish", "docker/metadata-action")["with"]
    tags = set() if inputs["flavor"] == "latest=false" else {"latest"}
    known = {f"steps.tags.outputs.{name}": value for name, value in outputs.items()}
    known |= {"github.ref": ref, "github.sha": COMMIT}
    name = ref.split("/", 2)[2]
    values = {
        "${{ steps.tags.outputs.fixed }}": outputs["fixed"],
        "{{major}}.{{minor}}": name[1:].rpartition(".")[0],
        "branch": name,
    }
    for rule in inputs["tags"].splitlines():
        value, condition = re.fullmatch(r"type=\w+,\w+=(.*),enable=(.*)", rule).groups()
        if str(evaluate(condition, known)).lower() == "true":
            tags.add(values.get(value, value))
    return tags


@pytest.mark.parametrize(
    ("head", "registry", "tags"),
    [
        (COMMIT, NOT_FOUND, {SHA_TAG, "main", "latest", "dev"}),
        (COMMIT, PUBLISHED, {"main", "latest", "dev"}),
        (NEWER_COMMIT, PUBLISHED, set()),
        (NEWER_COMMIT, NOT_FOUND, {SHA_TAG}),
    ],
    ids=["newest", "weekly", "older-again", "older-that-had-failed"],
)
def test_main_moves_its_tags_only_at_newest_commit(decide, head, registry, tags):
    assert decide(head=head, docker=registry).tags == tags


@pytest.mark.parametrize(
    ("branch", "own"),
    [(name, {name}) for name in ("Feature_X.2", "2-fix", "x" * 128)]
    + [(name, set()) for name in ("#12-fix", "topic/1", "x" * 129, "dev", "1.2", "run-7", SHA_TAG)],
)
def test_branch_moves_its_tag_if_valid_and_free(decide, branch, own):
    assert decide(f"refs/heads/{branch}").tags == {SHA_TAG, *own}


@pytest.mark.parametrize(
    ("release", "others", "registry", "tags"),
    [
        ("v1.2.3", [], NOT_FOUND, {"1.2.3", "1.2"}),
        ("v1.2.3", [], PUBLISHED, {"1.2"}),
        ("v1.2.10", ["v1.2.9"], NOT_FOUND, {"1.2.10", "1.2"}),
        ("v1.2.9", ["v1.2.10"], NOT_FOUND, {"1.2.9"}),
        ("v1.2.9", ["v1.2.010", "v1.2.11-rc1", "v1.2.9.5"], NOT_FOUND, {"1.2.9", "1.2"}),
    ],
    ids=["first", "again", "10-after-9", "9-after-10", "next-to-odd-tags"],
)
def test_release_moves_its_line_only_as_highest(decide, release, others, registry, tags):
    done = decide(f"refs/tags/{release}", releases=[release, *others], docker=registry)
    assert done.tags == tags


@pytest.mark.parametrize(
    ("ref", "path"),
    [(MAIN, "*/branches/*"), ("refs/tags/v1.2.3", "*/tags/*"), (MAIN, "*/orders")],
)
def test_no_tag_moves_if_github_fails(decide, ref, path):
    assert decide(ref, gh=f"case $2 in {path}) exit 1 ;; esac; {GH}").returncode != 0


@pytest.mark.parametrize("error", ["ERROR: 503", "ERROR: token: not found"])
def test_no_tag_moves_if_registry_fails(decide, error):
    done = decide(docker=f"echo {error}; exit 1")
    assert done.returncode != 0
    assert f"Cannot look up {IMAGE}:{SHA_TAG}: {error}" in done.stdout


def test_all_tags_are_given_to_tried_digest(run):
    step = find("publish", "imagetools create")
    assert not evaluate(step["if"], {"env.DOCKER_METADATA_OUTPUT_TAGS": ""})
    done = run(step, variables={"DOCKER_METADATA_OUTPUT_TAGS": "a:1\na:2"}, docker='echo "$@"')
    assert done.stdout == f"buildx imagetools create --tag=a:1 --tag=a:2 {IMAGE}@{DIGEST}\n"


@pytest.mark.parametrize("private", [False, True])
def test_only_public_image_is_signed_and_verified(run, decide, private):
    sign, verify = find("publish", "actions/attest"), find("publish", "gh attestation verify")
    known = {"steps.tags.outputs.private": decide(private=private).outputs["private"]}
    assert evaluate(sign["if"], known) == evaluate(verify["if"], known) == (not private)
    assert sign["with"]["subject-digest"] == "${{ env.DIGEST }}"
    assert f" oci://{IMAGE}@{DIGEST} " in run(verify, gh='echo "$@"').stdout


# What is built and tried before the tags


@pytest.mark.parametrize("tag", ["v2026.01.15", "v01.2.3", "v1.2.3-rc1", "v1.2", "1.2.3"])
def test_tag_without_release_number_is_not_built(run, tag):
    rejected = run(find("build", "GITHUB_REF_TYPE"), f"refs/tags/{tag}")
    assert rejected.returncode == 1
    assert re.search(rf"::error::.* v1\.2\.3, .*got {tag}\.", rejected.stdout)


@pytest.mark.parametrize(("ref", "version"), [(MAIN, COMMIT), ("refs/tags/v1.2.3", "1.2.3")])
def test_image_has_owner_in_lower_case_and_version(run, ref, version):
    plan = run(find("build", "GITHUB_REF_TYPE"), ref).outputs
    assert (plan["image"], plan["version"]) == (IMAGE, version)


PUBLISHES = dict.fromkeys(["push", "workflow_dispatch", "schedule"], True)
ONLY_BUILDS = dict.fromkeys(["pull_request", "merge_group", "not_known_yet"], False)


@pytest.mark.parametrize(("event", "publishes"), {**PUBLISHES, **ONLY_BUILDS}.items())
def test_only_events_that_publish_log_in_and_push(event, publishes):
    publish = evaluate(WORKFLOW["env"]["PUBLISH"], {"github.event_name": event})
    known = {"env.PUBLISH": str(publish).lower(), "steps.build.outputs.digest": DIGEST}
    assert evaluate(find("build", "docker/login-action")["if"], known) == publishes
    pushed = evaluate(find("build", "docker/build-push-action")["with"]["push"], known)
    assert str(pushed).lower() == str(publishes).lower()
    known["needs.build.outputs.digest"] = evaluate(JOBS["build"]["outputs"]["digest"], known)
    assert evaluate(JOBS["try"].get("if", True), known) == publishes


def try_image(run, hits=1, **fault):
    """Run the script that tries an image, which answers well apart from the fault."""
    health = json.dumps({"version": "1.2.3", "build_date": "today", "redis_ok": True} | fault)
    hit = json.dumps({"hit_count": hits})
    curl = f"case $* in */health) echo '{health}' ;; *) echo '{hit}' ;; esac"
    variables = {"BUILD_VERSION": "1.2.3", "BUILD_DATE": "today"}
    return run(find("try", "compose up"), variables=variables, docker='echo "$@"', curl=curl)


def test_good_image_passes_try_and_is_removed(run):
    done = try_image(run)
    assert done.returncode == 0
    assert done.stdout.endswith("compose down --volumes\n")


@pytest.mark.parametrize(
    "fault",
    [{"version": "1.2"}, {"build_date": "unknown"}, {"redis_ok": False}, {"hits": None}],
    ids=str,
)
def test_faulty_image_gets_no_tag(run, fault):
    done = try_image(run, **fault)
    assert done.returncode != 0
    assert "compose logs" in done.stdout, "the containers' log is not shown"
    assert "try" in JOBS["publish"]["needs"]


def test_try_deploys_pushed_digest_with_registry_file():
    assert find("try", "docker/login-action"), "no private image can be pulled"
    run_tag = "run-${{ github.run_id }}"
    pushed = find("build", "docker/build-push-action")["with"]["tags"]
    assert pushed.rpartition(":")[2] == run_tag
    deployed = find("try", "compose up")["env"]
    assert deployed["IMAGE_TAG"] == f"{run_tag}@${{{{ needs.build.outputs.digest }}}}"
    assert deployed["COMPOSE_FILE"].rpartition("/")[2] == "docker-compose.registry.yml"


@pytest.mark.parametrize(
    ("variable", "runners"),
    [("", ["ubuntu-24.04", "ubuntu-24.04-arm"]), ("linux/arm64", ["ubuntu-24.04-arm"])],
)
def test_every_platform_is_tried_on_its_own_runner(run, variable, runners):
    platforms = evaluate(WORKFLOW["env"]["PLATFORMS"], {"vars.PLATFORMS": variable})
    plan = run(find("build", "GITHUB_REF_TYPE"), variables={"PLATFORMS": platforms})
    tried = json.loads(plan.outputs["platforms"])
    runs_on = JOBS["try"]["runs-on"]
    assert [evaluate(runs_on, {"matrix.platform": name}) for name in tried] == runners


# What only these tests and the rows in test_files.py guard


def test_job_that_runs_image_cannot_write():
    for name, job in JOBS.items():
        scripts = " ".join(step.get("run", "") for step in job["steps"])
        runs_image = re.search(r"docker (compose|run|start|stack)|pytest", scripts)
        writes = "write" in job["permissions"].values()
        assert not (runs_image and writes), f"{name} runs an image and can write"


def test_linters_and_both_pythons_are_used():
    dockerfile = (PROJECT / "app/Dockerfile").read_text()
    image_python = re.search(r"^FROM python:([\d.]+)", dockerfile, re.M)[1]
    oldest, newest = JOBS["test"]["strategy"]["matrix"]["python"]
    assert newest == image_python
    assert evaluate(find("test", ".ci/lint && python -m pytest")["if"], {"matrix.python": oldest})
    assert evaluate(find("test", "$MARKS")["if"], {"matrix.python": newest})


@pytest.mark.parametrize(
    ("event", "marks"),
    [("push", "engine or swarm"), ("schedule", "(engine or swarm) and not texts")],
)
def test_every_mark_but_timing_is_run(event, marks):
    """A stale sentence in a text must not hold back the weekly update."""
    expression = find("test", "$MARKS")["env"]["MARKS"]
    assert evaluate(expression, {"github.event_name": event}) == marks


def test_published_image_describes_itself():
    inputs = find("build", "docker/build-push-action")["with"]
    assert (inputs["provenance"], inputs["sbom"], inputs["pull"]) == ("mode=max", True, True)
    labels = re.findall(r"opencontainers\.image\.(\w+)", inputs["labels"])
    assert labels == ["revision", "source"], "the Dockerfile's own labels are replaced"
    assert re.findall(r"index:[\w.]+\.(\w+)", inputs["annotations"]) == ["title", "description"]
    assert "ignore-error=true" in inputs["cache-to"], "a failing cache stops a release"


def test_no_job_hangs_or_ignores_failure():
    for name, job in JOBS.items():
        assert job.get("timeout-minutes", 360) <= 30, name
    assert not re.findall(r"continue-on-error|always\(\)|failure\(\)|cancelled\(\)", str(JOBS))
