"""What lesson_25.md alone promises: its boxes, and the figures and lines that it names."""

import ast
import re
import subprocess
import sys

from harness import REPOSITORY, checklist, texts
from harness.limits import LAYERS_OVER_BASE_BYTES


def test_every_box_names_a_test_that_exists_or_is_the_readers():
    assert len(checklist.boxes()) >= 10, f"the lesson has only {len(checklist.boxes())} boxes"
    for claim, tests in checklist.boxes():
        is_readers = claim.startswith("My ")
        assert bool(tests) != is_readers, f"a test proves it, or the reader sees it: {claim}"
        for test in tests:
            path, name = test.split("::")
            tree = ast.parse((REPOSITORY / path).read_text())
            functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert name in functions, f"{test} does not exist, though it shall prove: {claim}"


def test_a_run_ends_with_the_boxes():
    proved = {tests[0]: claim for claim, tests in checklist.boxes() if tests}
    test = next(name for name in proved if "test_workflow.py" in name)  # which needs no engine
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout
    for name, claim in proved.items():
        line = f"[x] {claim}\n" if name == test else f"[ ] {claim} (not run)\n"
        assert line in shown, f"the run's last lines do not say {line!r}:\n{shown}"


def test_what_the_reader_shall_break_is_there():
    app = (REPOSITORY / "labs/lesson_25/app/app.py").read_text()
    lesson = texts.read("lesson_25.md")
    lines = re.findall(r"sed -i\.bak 's/(.*?)/.*/' labs/lesson_25/app/app\.py", lesson)
    assert lines, "the lesson breaks no line of app.py"
    for line in lines:
        assert app.count(line) == 1, f"app.py has {line!r} {app.count(line)} times, not once"


def test_the_sizes_in_the_lesson_are_those_of_the_benchmark():
    row = r"layers over the base image, unpacked \| ([\d.]+) MB \| (\d+) MB"
    stated = {sizes for text in texts.texts() for sizes in re.findall(row, texts.read(text))}
    assert len(stated) == 1, f"the benchmark's sizes are not one and the same: {stated}"
    ours, single_stage = stated.pop()
    limit = LAYERS_OVER_BASE_BYTES // 1_000_000
    assert float(ours) < limit, f"the benchmark's {ours} MB are not below the limit of {limit}"
    sentence = f"Over {int(single_stage) // 100}00 MB became less than {limit}."
    assert sentence in texts.read("lesson_25.md"), f"the lesson does not say: {sentence}"
