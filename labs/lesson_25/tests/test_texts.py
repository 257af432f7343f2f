"""The texts: their commands work and print what is shown, and what they name exists."""

import re
import subprocess
import sys

import pytest

from harness import PROJECT, texts

pytestmark = pytest.mark.texts

TEXTS = texts.texts()
UNITS = [unit for text in TEXTS for unit in texts.units(text)]
BLOCKS = [block for unit in UNITS for block in unit.blocks]
MARKS = {
    "sh": "|fails|test|not run: .+",
    "text": "|said by GHCR",
    "diff": "",
    "mermaid": "",
}


def test_every_block_is_checked_or_has_reason():
    for block in BLOCKS:
        allowed = MARKS.get(block.kind, "from: .+")
        assert re.fullmatch(allowed, block.mark), (
            f"{block.place()}: {block.kind} block with {block.mark!r}"
        )
        if block.mark.startswith("from: "):
            path = block.mark.removeprefix("from: ")
            assert block.body in texts.read(path), f"{block.place()}: not in {path}\n{block.body}"
    run = sum(block.is_run for block in BLOCKS)
    assert run >= 60, f"only {run} blocks are run"


@pytest.mark.parametrize("text", TEXTS)
def test_links_point_to_files_and_headings(text):
    broken = texts.broken_links(text)
    assert not broken, f"{text}: links to a missing file or heading: {broken}"


def test_lesson_names_tests_that_exist():
    named = set(re.findall(r"(labs/[\w/]+\.py)::(\w+)", texts.read("lesson_25.md")))
    assert len(named) >= 10, f"the lesson proves its boxes by only {len(named)} tests"
    for path, name in sorted(named):
        exists = f"\ndef {name}(" in texts.read(path)
        assert exists, f"lesson_25.md names a test that does not exist: {path}::{name}"


def test_lesson_changes_lines_that_exist():
    commands = re.findall(r"sed -i\.bak 's/(.*?)/.*?' (labs/\S+)", texts.read("lesson_25.md"))
    assert commands, "the lesson changes no line of the app"
    for line, path in commands:
        count = texts.read(path).count(line)
        assert count == 1, f"lesson_25.md changes {line!r}, which is in {path} {count} times"


def test_benchmark_starts_without_engine():
    subprocess.run([sys.executable, PROJECT / "bench" / "bench.py", "--help"], check=True)


def parameter(unit):
    mark = pytest.mark.swarm if unit.in_own_swarm else pytest.mark.engine
    return pytest.param(unit, id=unit.name, marks=mark)


@pytest.mark.parametrize("unit", [parameter(unit) for unit in UNITS if unit.commands()])
def test_commands_print_what_text_shows(unit, followed):
    followed[unit.name].result()
