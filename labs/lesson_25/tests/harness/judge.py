"""`pytest --step=3`: which of a step's promises the reader's own mine/Dockerfile keeps.

The promises are the tests of test_image.py, which guard the project's own image as well. A test's
docstring is its promise, and the first line of its failure says what was seen instead.
"""

import pytest

from harness import PROJECT

PROMISES = PROJECT / "tests" / "test_image.py"
STEPS = {
    "1": [
        "test_starts_and_answers",
        "test_the_builder_builds_alone",
        "test_the_app_is_in_a_folder_of_its_own",
        "test_the_history_shows_what_came_from_the_builder",
        "test_holds_no_build_tool",
        "test_holds_no_package_cache",
        "test_stays_below_its_limit_over_the_base",
    ],
    "2": [
        "test_starts_and_answers",
        "test_a_build_takes_in_only_what_it_needs",
    ],
    "3": [
        "test_starts_and_answers",
        "test_a_change_of_the_app_makes_one_small_new_layer",
        "test_a_build_refuses_a_package",
        "test_the_app_is_in_a_folder_of_its_own",
        "test_holds_no_file_of_the_build",
        "test_stays_below_its_limit_over_the_base",
    ],
    "4": [
        "test_starts_and_answers",
        "test_its_user_is_a_number_and_not_root",
        "test_runs_as_appuser_with_no_shell_and_no_home",
        "test_cannot_change_its_own_program",
        "test_runs_though_only_its_owner_may_read_the_files",
        "test_holds_no_pip",
        "test_holds_the_locked_packages_and_no_other",
        "test_names_the_python_version_in_from_alone",
        "test_a_change_of_the_app_makes_one_small_new_layer",
        "test_stays_below_its_limit_over_the_base",
    ],
    "5": [
        "test_starts_and_answers",
        "test_says_where_it_runs",
        "test_the_first_process_is_the_server",
        "test_ends_with_status_0_when_it_is_stopped",
        "test_its_health_is_known_soon_after_the_start",
        "test_its_health_is_asked_often_enough_and_not_for_ever",
        "test_the_health_check_follows_host_and_port",
        "test_the_health_check_tells_whether_health_is_well",
        "test_runs_read_only_without_capabilities_and_as_any_user",
    ],
    "6": [
        "test_starts_and_answers",
        "test_labels_and_health_tell_the_build",
        "test_a_build_without_arguments_says_dev",
        "test_a_new_version_makes_no_new_layer",
    ],
}
# At the end, all of them: a later step may have undone what an earlier one did.
STEPS["all"] = list(dict.fromkeys(name for names in STEPS.values() for name in names))


def pytest_addoption(parser):
    parser.addoption("--step", choices=STEPS, help="judge mine/Dockerfile by a step of Part 2")
    parser.addoption("--mine", default="mine", help="the folder that --step judges")


def pytest_configure(config):
    step = config.getoption("step")
    if not step:
        return
    folder = config.rootpath / config.getoption("mine")
    if not (folder / "Dockerfile").is_file():
        raise pytest.UsageError(
            f"there is no {config.getoption('mine')}/Dockerfile: Part 2 begins by making it"
        )
    config.option.app_folder = folder
    config.args[:] = [str(PROMISES)]
    # The judge says all that is said.
    config.option.verbose = -2
    config.option.tbstyle = "no"
    config.option.reportchars = ""
    config.option.disable_warnings = True
    config.pluginmanager.register(Judge(config, step), "judge")


class Judge:
    def __init__(self, config, step):
        self.step = step
        self.config = config
        self.broken = {}  # the reason by promise
        self.kept = set()
        self.no_verdict = None  # why nothing could be judged

    def pytest_collection_modifyitems(self, session, config, items):
        """Keep the step's tests, in the step's order."""
        names = STEPS[self.step]
        mine = [item for item in items if item.originalname in names]
        mine.sort(key=lambda item: names.index(item.originalname))
        if lost := set(names) - {item.originalname for item in mine}:
            raise pytest.UsageError(f"test_image.py has no {', '.join(sorted(lost))}")
        items[:] = mine
        last = {}
        for item in mine:
            last[item.originalname] = item
        self.last_items = set(last.values())

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """Show no dot."""
        return report.outcome, "", ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        promise = item.function.__doc__.strip().splitlines()[0].rstrip(".")
        if report.failed:
            self.broken.setdefault(promise, reason(call.excinfo))
            if call.when == "setup" and " build --tag" in reason(call.excinfo, whole=True):
                self.no_verdict = build_problem(reason(call.excinfo, whole=True))
                item.session.shouldstop = "it does not build"
        elif report.skipped:
            self.no_verdict = str(call.excinfo.value)
            item.session.shouldstop = "no engine"
        if call.when == "teardown" and item in self.last_items and not self.no_verdict:
            self.say(promise)
        return report

    def say(self, promise):
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if promise in self.broken:
            terminal.write_line(f"[ ] {promise}")
            for line in self.broken[promise].splitlines():
                terminal.write_line(f"    {line}")
        else:
            self.kept.add(promise)
            terminal.write_line(f"[x] {promise}")

    def pytest_terminal_summary(self, terminalreporter):
        if self.no_verdict:
            terminalreporter.write_line(f"Nothing was judged: {self.no_verdict}")
            return
        total = len(self.kept) + len(self.broken)
        which = "in all steps" if self.step == "all" else f"in step {self.step}"
        if self.broken:
            verdict = f"{len(self.kept)} of {total} promises kept {which}."
        else:
            verdict = (
                f"All {total} promises kept {which}: your answer is right, unlike ours or not."
            )
        terminalreporter.write_line(verdict)


def reason(excinfo, whole=False):
    """Return what a failure says, without pytest's own lines below it."""
    text = str(excinfo.value) or type(excinfo.value).__name__
    if whole:
        return text
    if text.startswith("docker "):  # a command that no test expected to fail
        command, *said = text.strip().splitlines()
        errors = [line for line in said if line.startswith("Error response from daemon")]
        return f"{command[:60]} … failed: {(errors or said or ['in silence'])[-1]}"
    lines = []
    for line in text.splitlines():
        if line.startswith("assert "):
            break
        lines.append(line)
    return "\n".join(lines[:6]) or text


def build_problem(said):
    """Return why a build has failed, in the words of its output."""
    lines = [line for line in said.splitlines() if line.strip()]
    why = failed_step(lines) or error_lines(lines) or lines[-3:]
    return "mine/Dockerfile does not build.\n    " + "\n    ".join(why)


def failed_step(lines):
    """Return the last words of the step that failed, and the build's last line.

    BuildKit shows the step between two lines of six dashes. Where no step has failed, as with a
    Dockerfile that cannot be read, there are none, and the result is None.
    """
    dashes = [number for number, line in enumerate(lines) if line == "------"]
    if len(dashes) < 2:
        return None
    step_lines = lines[dashes[0] + 1 : dashes[1]]
    return [*step_lines[-6:], lines[-1]]


def error_lines(lines):
    """Return the last three lines that tell of an error."""
    return [line for line in lines if "ERROR" in line or "error:" in line.lower()][-3:]
