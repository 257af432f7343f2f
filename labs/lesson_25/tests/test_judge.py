"""`pytest --step=N`, which judges a reader's own Dockerfile: its words, and that they are true."""

import ast
import subprocess
import sys

import pytest

from harness import PROJECT, REPOSITORY
from harness.judge import STEPS

# Answers at once, without the app: where /health leads to a file, its answer is 200.
TAKES_ALL = """
FROM python:3.12-slim AS runtime
COPY . .
CMD ["python", "-m", "http.server", "8080"]
"""


def judge(step, folder):
    """Return (exit status, what is printed) of the command that the lesson gives."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += [f"--step={step}", f"--mine={folder}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_every_promise_of_a_step_is_a_test_of_the_image_and_says_what_it_promises():
    tree = ast.parse((PROJECT / "tests" / "test_image.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for step, names in STEPS.items():
        for name in names:
            assert name in functions, f"step {step} asks {name}, which test_image.py has not"
            assert ast.get_docstring(functions[name]), f"{name} does not say what it promises"


def test_a_reader_without_a_dockerfile_is_told_so(tmp_path):
    status, said = judge(1, tmp_path)
    assert status != 0, "the judge is content without a Dockerfile"
    assert "there is no " in said, f"the judge does not say that there is no Dockerfile:\n{said}"


@pytest.mark.engine
def test_a_broken_promise_is_named_with_what_was_seen_and_a_kept_one_is_ticked(tmp_path):
    """That all kept ones are called so the lesson shows, which judges each step's right answer."""
    (tmp_path / "Dockerfile").write_text(TAKES_ALL)
    for file in ("requirements.txt", "app.py", "health"):
        (tmp_path / file).write_text("{}")
    status, said = judge(2, tmp_path)
    for line in (
        "[x] A container of it starts, and answers from outside with a 200",
        "[ ] The build gets the app's files and requirements.txt, and none that lies beside them",
        "    the build also gets .env, Dockerfile, health, large.bin, notes.txt",
        "1 of 2 promises kept in step 2.",
    ):
        assert line in said, f"the judge does not say {line!r}:\n{said}"
    assert status == 1, f"the judge ends with status {status} though promises are broken"
    assert "Traceback" not in said, f"the judge shows a traceback:\n{said}"


@pytest.mark.engine
def test_what_does_not_build_is_not_judged(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python:3.12-slim\nRUN rm /usr/local/lib\n")
    status, said = judge(1, tmp_path)
    assert status != 0, "the judge is content with what does not build"
    assert "Nothing was judged: mine/Dockerfile does not build." in said, said
    why = "cannot remove '/usr/local/lib': Is a directory"
    assert why in said, f"the judge does not say why it does not build:\n{said}"
