"""The lists of packages: each lock is made from the short list beside it, and the locks agree."""

import re

import pytest
from packaging.requirements import Requirement

from harness import PROJECT, REPOSITORY

LISTS = sorted([*REPOSITORY.glob(".ci/requirements.in"), *PROJECT.glob("*/requirements.in")])


def wanted(short_list):
    """Return the packages that a requirements.in asks for, by name."""
    lines = [line.partition("#")[0].strip() for line in short_list.read_text().splitlines()]
    asked = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {one.name: one for one in asked}


def locked(short_list):
    """Return (version, number of hashes, whether it was asked for) of each package of a lock."""
    found = {}
    for entry in re.split(r"\n(?=\w)", short_list.with_suffix(".txt").read_text()):
        if package := re.match(r"(\S+)==(\S+)", entry):
            name, version = package.groups()
            is_asked_for = "-r requirements.in" in entry
            found[name] = (version, entry.count("--hash=sha256:"), is_asked_for)
    return found


@pytest.mark.parametrize("short_list", LISTS, ids=lambda path: path.parent.name)
def test_the_lock_has_what_its_short_list_asks_for_and_what_that_needs(short_list):
    asked, lock = wanted(short_list), locked(short_list)
    made_from = {name for name, (_, _, is_asked_for) in lock.items() if is_asked_for}
    assert made_from == set(asked), f"the lock was made from another list than {short_list}"
    for name, one in asked.items():
        version = lock[name][0]
        assert version in one.specifier, f"{short_list} asks for {one}, the lock has {version}"


@pytest.mark.parametrize("short_list", LISTS, ids=lambda path: path.parent.name)
def test_every_locked_package_has_its_version_and_its_hashes(short_list):
    lock = short_list.with_suffix(".txt")
    lines = [line for line in lock.read_text().splitlines() if re.match(r"\w", line)]
    assert len(lines) == len(locked(short_list)) > 0, f"{lock} has lines that are no locked package"
    for name, (_, hashes, _) in locked(short_list).items():
        assert hashes, f"{lock}: {name} has no hash"


def test_the_tests_have_the_versions_that_the_app_has():
    app, tests = (locked(PROJECT / room / "requirements.in") for room in ("app", "tests"))
    for name in app.keys() & tests.keys():
        versions = app[name][0], tests[name][0]
        assert len(set(versions)) == 1, (
            f"{name}: the app has {versions[0]}, the tests {versions[1]}"
        )
