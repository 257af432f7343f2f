"""What a run publishes, and what its image is called. Every rule of the names is in this file.

The image of a branch gets
    sha-0a1b2c3    its commit; of one that the default branch has too, there alone
    its branch     while the commit is the newest of the branch; a slash becomes a dash
    latest, dev    the same, on the default branch alone
The image of a release, the tag v1.2.3, gets
    1.2.3          once
    1.2            while no release of this line is higher, as numbers

The workflow calls `publish.py plan` at the start, `publish.py unpublished` before it builds a
release, and `publish.py name` once the image has run.
"""

import json
import os
import re
import subprocess
import sys
import time
from urllib.parse import quote

NUMBER = r"(0|[1-9][0-9]*)"  # no leading zero: 1.02 and 1.2 would be one version
RELEASE = re.compile(rf"v{NUMBER}\.{NUMBER}\.{NUMBER}")
REGISTRY_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
NOT_FOR_BRANCHES = re.compile(r"latest|dev|(run|sha)-.*|[0-9.]+")  # they are called by other rules

PUBLISHED_PLATFORMS = ["linux/amd64", "linux/arm64"]
WITHOUT_WHEELS = re.compile(r"linux/(386|arm(/v[5-7])?|mips64le|ppc64le|riscv64|s390x)")


def say(sentence):
    """Show a sentence on the run's page."""
    print(f"::notice::{sentence}", flush=True)


def stop(sentence):
    """End the job in red, with a sentence on the run's page."""
    print(f"::error::{sentence}")
    sys.exit(1)


# What others know: GitHub, and the registry


def ask(path=""):
    """Return what GitHub's API says of this repository at a path. Stop where it does not answer."""
    address = f"repos/{os.environ['GITHUB_REPOSITORY']}{path}"
    for pause_seconds in (2, 5, 10, 0):
        answer = subprocess.run(["gh", "api", address], stdout=subprocess.PIPE, text=True)
        if answer.returncode == 0:
            return json.loads(answer.stdout)
        time.sleep(pause_seconds)
    stop(f"GitHub did not answer what `gh api {address}` asks, so nothing was done.")


def refs(beginning):
    """Return the commit or tag object of each ref under refs/ that begins so."""
    found = ask(f"/git/matching-refs/{quote(beginning)}?per_page=100")
    return {ref["ref"]: ref["object"]["sha"] for ref in found}


def is_on(branch, commit):
    """Return whether a branch has a commit."""
    return ask(f"/compare/{quote(branch)}...{commit}")["status"] in {"identical", "behind"}


def look_up(name):
    """Return what the registry answers about a name of the image, as a CompletedProcess."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{json .Manifest}}", name]
    return subprocess.run(command, capture_output=True, text=True)


# The start: what this run builds


def version(ref_type, ref_name, commit):
    """Return the version that the image shows: a release's numbers or the commit."""
    if ref_type != "tag":
        return commit
    if not RELEASE.fullmatch(ref_name):
        stop(
            f"The tag {ref_name} is no release: it takes three numbers without leading zeros, "
            "as v1.2.3. Delete the tag, and push one that is."
        )
    return ref_name.removeprefix("v")


def platforms(wanted):
    """Return the platforms of a list with commas."""
    listed = [platform.strip() for platform in wanted.split(",")]
    for platform in listed:
        if WITHOUT_WHEELS.fullmatch(platform):
            stop(f"PLATFORMS is '{wanted}': not all packages have wheels for {platform}.")
        if platform not in PUBLISHED_PLATFORMS:
            stop(f"PLATFORMS is '{wanted}': there is no machine to try '{platform}' on.")
    return listed


def plan():
    """Hand to the other jobs what they build and call the image."""
    ref_type, ref_name = os.environ["GITHUB_REF_TYPE"], os.environ["GITHUB_REF_NAME"]
    repository = ask()
    outputs = {
        "version": version(ref_type, ref_name, os.environ["GITHUB_SHA"]),
        "platforms": json.dumps(platforms(os.environ["PLATFORMS"])),
        "image": f"ghcr.io/{os.environ['GITHUB_REPOSITORY_OWNER'].lower()}/lab25-web",
        "default_branch": repository["default_branch"],
        "private": json.dumps(repository["private"]),
    }
    with open(os.environ["GITHUB_OUTPUT"], "a") as file:
        file.writelines(f"{name}={value}\n" for name, value in outputs.items())


def unpublished():
    """Stop where the release has its image already."""
    name = f"{os.environ['IMAGE']}:{os.environ['GITHUB_REF_NAME'].removeprefix('v')}"
    # Any other answer is no reason to stop: a package that does not exist yet may be `denied`.
    # Before the name is given, `release_names` asks again, and wants to know.
    if look_up(name).returncode == 0:
        stop(f"{name} is published already, and a release is given once: push a tag of its own.")


# The end: the names


def branch_names(branch, commit, default_branch):
    """Return the names that the image of a branch's commit may have now; say what it may not."""
    short = f"sha-{commit[:7]}"
    names = [short]
    if branch != default_branch and is_on(default_branch, commit):
        say(f"{short} stays where it is: {default_branch} has this commit too, and names it.")
        names = []

    own = own_names(branch, default_branch)
    newest = refs(f"heads/{branch}").get(f"refs/heads/{branch}") if own else commit
    if newest != commit:
        now = f"which is {newest[:7]} now" if newest else "which is gone"
        say(f"No move of {', '.join(own)}: {commit[:7]} is not the newest of {branch}, {now}.")
        return names
    return names + own


def own_names(branch, default_branch):
    """Return the names that follow a branch."""
    shared = ["latest", "dev"] if branch == default_branch else []
    tag = branch.replace("/", "-")
    if not REGISTRY_TAG.fullmatch(tag):
        say(f"The branch {branch} gets no name of its own: an image cannot be called so.")
        return shared
    if NOT_FOR_BRANCHES.fullmatch(tag):
        say(f"The branch {branch} gets no name of its own: {tag} is the name of something else.")
        return shared
    if tag != branch and f"refs/heads/{tag}" in refs(f"heads/{tag}"):
        say(f"The branch {branch} gets no name of its own: there is a branch {tag} too.")
        return shared
    return [tag, *shared]


def release_names(tag, image, digest):
    """Return the names that a release's image may have now; stop where it may not have its own."""
    numbers = RELEASE.fullmatch(tag).groups()
    full, line = ".".join(numbers), ".".join(numbers[:2])
    given = look_up(f"{image}:{full}")
    if given.returncode != 0 and "not found" not in given.stderr:
        stop(f"The registry does not say whether it has {image}:{full}: {given.stderr.strip()}")
    if given.returncode == 0 and json.loads(given.stdout)["digest"] != digest:
        stop(f"{image}:{full} is published already, and a release is given once.")

    found = [RELEASE.fullmatch(ref.removeprefix("refs/tags/")) for ref in refs(f"tags/v{line}.")]
    highest = max((int(release[3]) for release in found if release), default=None)
    if highest != int(numbers[2]):
        now = "its tag is gone" if highest is None else f"v{line}.{highest} is its highest release"
        say(f"No move of {line}: {now}.")
        return [full]
    return [full, line]


def name():
    """Give the image that has run the names that it may have."""
    image, digest = os.environ["IMAGE"], os.environ["DIGEST"]
    ref_type, ref_name = os.environ["GITHUB_REF_TYPE"], os.environ["GITHUB_REF_NAME"]
    if ref_type == "tag":
        names = release_names(ref_name, image, digest)
    else:
        names = branch_names(ref_name, os.environ["GITHUB_SHA"], os.environ["DEFAULT_BRANCH"])
    if names:
        tags = [f"--tag={image}:{given}" for given in names]
        command = ["docker", "buildx", "imagetools", "create", *tags, f"{image}@{digest}"]
        if subprocess.run(command).returncode != 0:
            stop("The registry did not take every name: start this job again.")
    say(f"{image}@{digest} is now called: {', '.join(names) or 'nothing new'}.")


if __name__ == "__main__":
    {"plan": plan, "unpublished": unpublished, "name": name}[sys.argv[1]]()
