"""The texts: their commands work and print what is shown, and what they name exists."""

import ast
import re
import subprocess
import sys

import pytest

from harness import PROJECT, REPOSITORY, texts

pytestmark = pytest.mark.texts

TEXTS = texts.texts()
UNITS = [unit for text in TEXTS for unit in texts.units(text) if unit.commands()]
BLOCKS = [block for text in TEXTS for block in texts.blocks(text)]
NOT_RUN = {
    "test",
    "not run: never ends",
    "not run: needs GitHub",
    "not run: needs several machines",
    "not run: the other of two ways",
    "not run: removes what is left",
    "not run: runs the tests",
    "not run: runs the benchmark",
}


def test_every_block_is_checked_or_has_reason():
    for block in BLOCKS:
        if block.kind == "sh":
            allowed = {"", "fails", *NOT_RUN}
        elif block.kind in texts.OUTPUT_KINDS:
            allowed = {"", "said by GHCR"}
        elif block.kind == "mermaid":
            allowed = {""}
        else:
            allowed = {block.mark} if block.mark.startswith("from: ") else set()
        assert block.mark in allowed, f"{block.place()}: {block.kind} block with {block.mark!r}"


def test_files_shown_are_the_files():
    for block in BLOCKS:
        if block.mark.startswith("from: "):
            path = block.mark.removeprefix("from: ")
            assert block.body in texts.read(path), f"{block.place()}: not in {path}\n{block.body}"


def test_every_section_with_commands_is_run():
    shown = sum(texts.read(text).count("```sh\n") for text in TEXTS)
    left_out = [block for block in BLOCKS if block.mark in NOT_RUN]
    run = [block for unit in UNITS for block, _ in unit.commands()]
    assert len(run) + len(left_out) == shown, f"{shown} sh blocks, {len(run)} of them run"
    assert len(UNITS) >= 12 and len(run) >= 60, f"{len(run)} blocks in {len(UNITS)} units are run"


@pytest.mark.parametrize("text", TEXTS)
def test_links_point_to_files_and_headings(text):
    broken = texts.broken_links(text)
    assert not broken, f"{text}: links to a missing file or heading: {broken}"


def test_lesson_names_tests_that_exist():
    named = set(re.findall(r"(labs/[\w/]+\.py)::(\w+)", texts.read("lesson_25.md")))
    assert len(named) >= 10, f"the lesson proves its boxes by only {len(named)} tests"
    for path, name in sorted(named):
        tree = ast.parse((REPOSITORY / path).read_text())
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert name in functions, f"lesson_25.md names a test that does not exist: {path}::{name}"


def test_lesson_changes_lines_that_exist():
    commands = re.findall(r"sed -i\.bak 's/(.*?)/.*?' (labs/\S+)", texts.read("lesson_25.md"))
    assert commands, "the lesson changes no line of the app"
    for line, path in commands:
        count = texts.read(path).count(line)
        assert count == 1, f"lesson_25.md changes {line!r}, which is in {path} {count} times"


def test_benchmark_starts_without_engine():
    subprocess.run([sys.executable, PROJECT / "bench" / "bench.py", "--help"], check=True)


def parameters(in_own_swarm):
    return [pytest.param(unit, id=unit.name) for unit in UNITS if unit.in_own_swarm == in_own_swarm]


@pytest.mark.engine
@pytest.mark.parametrize("unit", parameters(in_own_swarm=False))
def test_commands_print_what_text_shows(unit, followed):
    followed[unit.name].result()


@pytest.mark.swarm
@pytest.mark.parametrize("unit", parameters(in_own_swarm=True))
def test_swarm_commands_print_what_text_shows(unit, followed):
    followed[unit.name].result()
