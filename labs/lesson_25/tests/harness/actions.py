"""A small part of GitHub: it evaluates the workflow's expressions and runs its scripts.

Jobs wait for those that they need, and steps run in their order. GitHub's API, the registry, the
image and the actions are stand-ins.
"""

import json
import os
import re
import subprocess
from urllib.parse import quote

import yaml

from harness import REPOSITORY

IMAGE = "ghcr.io/some-capitals/lab25-web"
DIGEST = f"sha256:{'a' * 64}"
COMMIT, NEWER_COMMIT = "0a1b2c3" + "0" * 33, "4d5e6f7" + "0" * 33


def read(path):
    return yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))


WORKFLOW = read(".github/workflows/docker-image-lab25.yml")
JOBS = WORKFLOW["jobs"]

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
    answer=$(cat "$WORLD/tag-${4##*:}" || echo "$4: not found")
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
        self.folder, self.world = folder, {**WORLD, **world}
        self.pushed, self.output, self.results = [], "", {}
        self.prepare()
        for name, job in JOBS.items():
            needed = re.findall(r"\w+", str(job.get("needs", "")))
            wanted = evaluate(job.get("if", "true"), self.known)
            if not wanted or any(self.results[other] != "success" for other in needed):
                self.results[name] = "skipped"
                continue
            self.results[name] = self.world["assumed"].get(name) or self.finish(job)
            self.learn(f"needs.{name}.outputs", job.get("outputs", {}))

    def prepare(self):
        world = self.world
        _, kind, name = world["ref"].split("/", 2)
        github = {
            "": {"default_branch": "main", "private": world["private"]},
            f"/branches/{quote(name, safe='')}": {"commit": {"sha": world["head"]}},
            f"/git/matching-refs/tags/{name.rpartition('.')[0]}.": [
                {"ref": f"refs/tags/{release}"} for release in world["releases"]
            ],
        }
        github.pop(world["github_lacks"], None)
        self.write(github={f"repos/Some-Capitals/orders{path}": github[path] for path in github})
        self.write(**{f"tag-{tag}": answer for tag, answer in world["registry"].items()})
        self.write(hit={"hit_count": world["hit"]}, calls="", gh=GH, docker=DOCKER, curl=CURL)
        context = {
            "event_name": world["event"],
            "ref": world["ref"],
            "ref_name": name,
            "ref_type": {"tags": "tag"}.get(kind, "branch"),
            "sha": COMMIT,
            "repository": "Some-Capitals/orders",
            "repository_owner": "Some-Capitals",
            "output": str(self.folder / "outputs"),
        }
        self.known = {"true": True, "vars.PLATFORMS": world["platforms"]}
        self.learn("github", {**context, "token": "token", "run_id": "7"})
        self.variables = {f"GITHUB_{key.upper()}": value for key, value in context.items()}
        self.variables["PATH"] = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        self.variables["WORLD"] = str(self.folder)

    def write(self, **contents):
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (self.folder / name).write_text(text, encoding="utf-8")
            (self.folder / name).chmod(0o755)

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
        done = subprocess.run(
            ["bash", "--norc", "-eo", "pipefail", "-c", step["run"]],
            env=self.variables | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.output += done.stdout + done.stderr
        outputs = re.findall(r"(\w+)=(.*)", (self.folder / "outputs").read_text())
        self.learn(f"steps.{step.get('id')}.outputs", dict(outputs))
        return done.returncode == 0

    def build(self, inputs):
        """Do what docker/build-push-action does; the image answers with what it was told."""
        told = dict(line.split("=") for line in inputs["build-args"].splitlines())
        truth = {"version": told["BUILD_VERSION"], "build_date": told["BUILD_DATE"]}
        self.write(health={**truth, "redis_ok": True, **self.world["health"]})
        self.known["steps.build.outputs.digest"] = DIGEST
        if inputs["push"] == "true":
            self.pushed.append(inputs["tags"])

    def list_tags(self, inputs):
        """Return what docker/metadata-action lists."""
        name = self.world["ref"].split("/", 2)[2]
        branch_tag = re.sub(r"[^\w.-]+", "-", name)
        release = re.fullmatch(r"v(\d+[.]\d+)[.]\d+", name)
        tags = ["latest"] if release and inputs["flavor"] != "latest=false" else []
        for line in inputs["tags"].splitlines():
            rule = dict(part.split("=") for part in line.split(","))
            kinds = {"raw": rule.get("value"), "ref": branch_tag, "semver": release and release[1]}
            if rule["enable"] == "true":
                tags.append(kinds[rule["type"]])
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
