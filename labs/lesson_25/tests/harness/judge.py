"""The judge: `pytest --step=3` checks the reader's mine/Dockerfile against step 3 of the lesson.

The requirements of a step are the tests in test_image.py that have the mark `step` with its number.
The judge prints the docstring of each, and of each that fails the message, which explains the
reader's mistake.
"""

import re

import pytest

from harness import PROJECT

STEPS = ["1", "2", "3", "4", "5", "6", "all"]


def pytest_addoption(parser):
    parser.addoption("--step", choices=STEPS, help="check mine/Dockerfile against a step of Part 2")
    parser.addoption("--mine", default="mine", help="the folder that --step checks")


def pytest_configure(config):
    step = config.getoption("step")
    if not step:
        return
    folder = config.rootpath / config.getoption("mine")
    if not (folder / "Dockerfile").is_file():
        raise pytest.UsageError(f"Cannot find {folder}/Dockerfile: Part 2 starts by creating it.")
    config.option.app_folder = folder
    config.option.markexpr = ""  # pytest.ini deselects the tests that need an engine
    config.args[:] = [str(PROJECT / "tests" / "test_image.py")]
    # Only the judge prints results.
    config.option.verbose = -2
    config.option.tbstyle = "no"
    config.option.reportchars = ""
    config.option.disable_warnings = True
    config.pluginmanager.register(Judge(config, step))


class Judge:
    def __init__(self, config, step):
        self.config = config
        self.step = step
        self.required = 0
        self.met = 0

    def print(self, line):
        self.config.pluginmanager.get_plugin("terminalreporter").write_line(line)

    def pytest_collection_modifyitems(self, items):
        """Keep the tests of this step."""
        items[:] = [item for item in items if self.step in steps_of(item)]
        self.required = len(items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """Print no dots."""
        return report.outcome, "", ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        requirement = item.function.__doc__.splitlines()[0].rstrip(".")
        if hasattr(item, "callspec"):
            requirement = requirement.format(**item.callspec.params)
        if report.failed:
            self.print(f"[ ] {requirement}")
            for line in reason(call.excinfo):
                self.print(f"    {line}")
            if item is item.session.items[0]:
                item.session.shouldstop = "the other requirements need a container that starts"
        elif call.when == "call":
            self.met += 1
            self.print(f"[x] {requirement}")
        return report

    def pytest_terminal_summary(self):
        which = "of all steps" if self.step == "all" else f"of step {self.step}"
        if 0 < self.required == self.met:
            self.print(f"All {self.met} requirements {which} are met: your answer is correct.")
        else:
            self.print(f"{self.met} of {self.required} requirements {which} are met.")


def steps_of(item):
    """Return the steps in which this test is a requirement, as --step names them."""
    mark = item.get_closest_marker("step")
    return {*map(str, mark.args), "all"} if mark else set()


def reason(excinfo):
    """Return the lines that explain a failure."""
    lines = [line for line in str(excinfo.value).splitlines() if line.strip()]
    if lines and lines[0].startswith("docker "):
        command = " ".join(lines[0].split()[:2])
        # "#5 DONE 0.1s" is progress, "#5 0.1 cannot remove…" is output.
        output = [line for line in lines[1:] if not re.match(r"#\d+ \D", line)]
        return [f"`{command}` failed:", *output[-15:]]
    # After the message pytest prints the values in the assertion.
    ends = [number for number, line in enumerate(lines) if line.startswith("assert ")]
    return lines[: min([*ends, 6])] or [excinfo.typename]
