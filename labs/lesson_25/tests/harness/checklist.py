"""The lesson's checkboxes, each with the test that proves it, shown at the end of a run."""

import re

from harness import REPOSITORY

LESSON_TEXT = REPOSITORY / "lesson_25.md"
TEST_NAME = re.compile(r"`([\w/]+\.py::\w+)`")


def boxes():
    """Return (claim, the tests that prove it) of each box under Core and Acceptance criteria."""
    text = LESSON_TEXT.read_text(encoding="utf-8")
    proved = text[text.index("\n## Core\n") : text.index("\n## Summary\n")]
    lines = re.findall(r"^- \[.\] (.*)$", proved, re.M)
    return [
        (re.sub(r"[(:][^(:]*$", "", TEST_NAME.sub("", line)).strip(), TEST_NAME.findall(line))
        for line in lines
    ]


def outcomes(reporter):
    """Return what became of each test of the run, by its name without parameters.

    Where there are several, it is the worst.
    """
    ranks = {"passed": 0, "needs an engine": 1, "failed": 2}
    names = {
        "passed": "passed",
        "skipped": "needs an engine",
        "failed": "failed",
        "error": "failed",
    }
    found = {}
    for kind, name in names.items():
        for report in reporter.stats.get(kind, []):
            test = report.nodeid.partition("[")[0]
            found[test] = max(found.get(test, "passed"), name, key=ranks.get)
    return found


def pytest_terminal_summary(terminalreporter, config):
    """Print the checklist: each box ticked, crossed, or with the word why it is neither.

    A box without a test is the reader's own.
    """
    if config.getoption("step"):  # the judge has its own
        return
    found = outcomes(terminalreporter)
    marks = {"passed": "[x]", "failed": "[!]"}
    terminalreporter.section("lesson 25: Core and Acceptance criteria")
    for claim, tests in boxes():
        results = [found.get(test, "not run") for test in tests] or ["yours to tick"]
        result = next(
            (name for name in ("failed", "needs an engine", "not run") if name in results),
            results[0],
        )
        note = "" if result == "passed" else f" ({result})"
        terminalreporter.write_line(f"{marks.get(result, '[ ]')} {claim}{note}")
