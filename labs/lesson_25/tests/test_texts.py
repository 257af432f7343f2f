"""The texts: their commands work and print what is shown, and what they show is what is there."""

import difflib
import re

import pytest

from harness import REPOSITORY, reader, texts

TEXTS = texts.texts()
UNITS = texts.units(*TEXTS)
KINDS = {"sh", "text", "mermaid", "python", "yaml", "dockerfile", "diff"}
REASONS = {
    "never ends",
    "needs GitHub",
    "needs a swarm",
    "needs several machines",
    "the other of two ways",
    "removes what is left",
    "runs the tests",
    "runs the benchmark",
    "run by test_make_it_yours.py",
}


# What is shown


@pytest.mark.parametrize("text", TEXTS)
def test_every_file_shown_is_the_file(text):
    for block in texts.blocks(text):
        assert block.kind in KINDS, f"{block.place()}: what is a {block.kind!r} block?"
        if block.kind in {"python", "yaml", "dockerfile"}:
            path = re.fullmatch(r"from: (\S+)", block.mark)
            assert path, f"{block.place()}: which file is this of? <!-- from: … --> says it"
            file = (REPOSITORY / path[1]).read_text()
            assert block.body in file, f"{block.place()}: {path[1]} does not say\n{block.body}"


@pytest.mark.parametrize("text", TEXTS)
def test_every_change_shown_leads_from_the_one_file_to_the_other(text):
    for block in texts.blocks(text):
        if block.kind != "diff":
            continue
        names = re.fullmatch(r"diff: (.+), (.+)", block.mark)
        assert names, f"{block.place()}: between which files? <!-- diff: …, … --> says it"
        before, after = (texts.written_in(text, name) for name in names.groups())
        try:
            made = texts.changed(before, block.body.splitlines())
        except ValueError as line:
            pytest.fail(f"{block.place()}: {names[1]} has no such line here: {line}")
        left = "\n".join(difflib.unified_diff(made, after, "as shown", names[2], lineterm=""))
        assert made == after, f"{block.place()}: the change does not lead to {names[2]}\n{left}"


@pytest.mark.parametrize("text", TEXTS)
def test_every_link_within_the_repository_leads_somewhere(text):
    broken = texts.broken_links(text)
    assert not broken, f"{text}: links that lead to no file or no heading: {broken}"


@pytest.mark.parametrize("text", TEXTS)
def test_every_command_left_out_says_why(text):
    for block in texts.blocks(text):
        if block.kind == "sh" and block.mark != "test" and not block.is_run:
            reason = block.mark.removeprefix("not run: ")
            assert reason in REASONS, f"{block.place()}: {block.mark!r} is no reason, of {REASONS}"


@pytest.mark.parametrize("text", TEXTS)
def test_every_output_is_compared_but_for_the_words_of_ghcr(text):
    for block in texts.blocks(text):
        if block.kind == "text":
            assert block.mark in {"", reader.SAID_BY_GHCR}, f"{block.place()}: {block.mark!r}"


# What is run


def parameters(in_own_swarm):
    return [pytest.param(unit, id=unit.name) for unit in UNITS if unit.in_own_swarm == in_own_swarm]


@pytest.mark.engine
@pytest.mark.parametrize("unit", parameters(in_own_swarm=False))
def test_every_command_works_and_prints_what_the_text_shows(unit, followed):
    followed.result(unit)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("unit", parameters(in_own_swarm=True))
def test_every_command_for_a_swarm_works_in_an_engine_of_its_own(unit, followed):
    """A kernel without IPVS has no routing mesh: there the mesh is the test's own."""
    followed.result(unit)
