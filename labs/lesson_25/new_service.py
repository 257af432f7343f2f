#!/usr/bin/env python3
"""Create a repository for your own service from the files of this repository.

Usage: new_service.py NAME OWNER FOLDER
Example: new_service.py orders-api your-name ../orders-api
"""

import pathlib
import re
import shutil
import subprocess
import sys

CLONE = pathlib.Path(__file__).resolve().parents[2]
NAME_RULE = "1 to 30 letters, digits and dashes, with a letter first and no dash at the end"
OWNER_RULE = "a GitHub account: 1 to 39 letters, digits and single dashes between them"
# Names of files and folders that only the lesson needs.
LESSON = {"lesson_25.md", "steps", "bench", "new_service.py", "run"}
LESSON_TESTS = {"test_judge.py", "test_new_service.py", "test_texts.py", "test_timing.py"}
LESSON_HARNESS = {"judge.py", "reader.py", "texts.py"}
LESSON_LINES = r"^.*lesson only, to the end(?s:.*)|^(.*lesson only|@step\().*\n|, marks=step\(.*?\)"
README_SECTIONS = ("Run it", "Test it", "Publish it", "Where to read on", "Trouble")
REMAINS = """\
{folder} is a repository with one commit. Remaining decisions:
  license      add a LICENSE file
  description  in README.md and .github/workflows/docker-image-{name}.yml
  maintainer   the label in app/Dockerfile
  greeting     git grep "Hello from {name}"
Start and test it in {folder}:
  {prefix}_PORT=8081 docker compose -f compose/docker-compose.yml up -d --build --wait
  python3 -m venv .venv && .venv/bin/python -m pip install -r app/requirements.txt \
-r tests/requirements.txt && .venv/bin/python -m pytest"""


def in_lower_case(argument, value, pattern, rule):
    """Return value in lower case. Raise ValueError if that does not match the pattern."""
    lower = value.lower()
    if not re.fullmatch(pattern, lower):
        raise ValueError(f"{argument} must be {rule}, got {value!r}.")
    if lower != value:
        print(f"{argument} is changed to {lower}, because image names must be in lower case.")
    return lower


def new_words(name, prefix, owner):
    """Return the replacements for the lesson's words in the service's files and paths."""
    return {
        "labs/lesson_25/": "",
        "](../../../": "](../",
        "name: lab25\n": f'name: "{name}"\n',  # quoted, because a plain null is not a string
        # With a suffix, so that a service called redis does not get the host name of Redis.
        "container_name: lab25-web": f"container_name: {name}-web",
        '"/lab25-web"': f'"/{name}-web"',
        "rm -f lab25-web": f"rm -f {name}-web",
        "lab25-web": name,
        "lab25": name,
        "LAB25": prefix,
        "vlrrbn": owner,
        "redis_password": f"{name}_redis_password",  # all stacks of a swarm share its secrets
    }


def git(folder, *arguments):
    """Return the output of git. Raise CalledProcessError if git fails, after it printed why."""
    return subprocess.check_output(["git", "-C", folder, *arguments], text=True)


def copy_files(folder, name, words):
    """Copy the clone's files to the folder, and replace the words of the lesson."""
    # Python functions and variables keep their names.
    pattern = rf"(?<!_)({'|'.join(map(re.escape, words))})(?!\()"
    for path in git(CLONE, "ls-files").splitlines():
        if not {*path.split("/")}.isdisjoint(LESSON | LESSON_TESTS | LESSON_HARNESS):
            continue
        text = (CLONE / path).read_text(encoding="utf-8")
        if path == "README.md":
            sections = [one for one in text.split("\n## ") if one.startswith(README_SECTIONS)]
            text = "\n## ".join([f"# {name}\n\nA web service that counts its visits.\n", *sections])
        text = re.sub(LESSON_LINES, "", text, flags=re.MULTILINE)
        target = folder / re.sub(pattern, lambda word: words[word[0]], path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLONE / path, target)  # with its mode
        target.write_text(re.sub(pattern, lambda word: words[word[0]], text), encoding="utf-8")


def commit(folder, owner):
    """Commit the folder to a new repository, as the owner if git has no author configured."""
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", ".")
    author = []
    if subprocess.run(["git", "config", "user.email"], stdout=subprocess.DEVNULL).returncode:
        author = ["-c", f"user.name={owner}", "-c", f"user.email={owner}@users.noreply.github.com"]
    git(folder, *author, "commit", "--quiet", "--message=Start with a hit counter")


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[3])
    try:
        name = in_lower_case("NAME", sys.argv[1], "[a-z]([a-z0-9-]{0,28}[a-z0-9])?", NAME_RULE)
        owner = in_lower_case("OWNER", sys.argv[2], "[a-z0-9](-?[a-z0-9]){0,38}", OWNER_RULE)
        if folder.exists():
            raise ValueError(f"FOLDER must not exist yet, got {folder}.")
    except ValueError as error:
        sys.exit(str(error))
    # REDIS_PORT is already the port of Redis, so this service gets another prefix.
    prefix = "REDIS_SERVICE" if name == "redis" else name.upper().replace("-", "_")
    try:
        folder.mkdir()
        copy_files(folder, name, new_words(name, prefix, owner))
        commit(folder, owner)
    except (Exception, KeyboardInterrupt) as error:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(f"Cannot create {folder}: {error!r}")
    print(REMAINS.format(folder=folder, name=name, prefix=prefix))


if __name__ == "__main__":
    main()
