"""The judge of the reader's Dockerfile, and the Dockerfiles that the lesson gives as answers."""

import subprocess
import sys

import pytest

from harness import PROJECT, REPOSITORY

pytestmark = pytest.mark.engine

# Starts and answers, but is not the app: /health is a file with status 200.
FILE_SERVER = """
FROM python:3.12-slim AS runtime
WORKDIR /app
COPY . .
CMD ["python", "-m", "http.server", "8080"]
"""


def judge(step, folder):
    """Run the lesson's command. Return its exit status and its output."""
    command = [sys.executable, "-m", "pytest", f"--step={step}", f"--mine={folder}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_judge_prints_requirements_and_reason(tmp_path):
    (tmp_path / "Dockerfile").write_text(FILE_SERVER)
    for file in ("requirements.txt", "app.py", "health"):
        (tmp_path / file).write_text("{}")
    status, output = judge(2, tmp_path)
    assert status == 1, output
    for line in (
        "[x] A container starts, and answers requests from outside with status 200",
        "[ ] The build context has the app's .py files and requirements.txt, and nothing else",
        "    the build context must be ['app.py', 'requirements.txt'], got ['.env', ",
        "1 of 3 requirements of step 2 are met.",
    ):
        assert line in output, f"the output lacks {line!r}:\n{output}"


@pytest.mark.parametrize(
    ("dockerfile", "reason"),
    [
        (None, "/Dockerfile: Part 2 starts by creating it."),
        ("FROM python:3.12-slim\nRUN rm /usr/local/lib\n", "'/usr/local/lib': Is a directory"),
    ],
    ids=["no Dockerfile", "build fails"],
)
def test_judge_fails_with_reason(tmp_path, dockerfile, reason):
    if dockerfile:
        (tmp_path / "Dockerfile").write_text(dockerfile)
    status, output = judge(1, tmp_path)
    assert status != 0, f"it succeeds:\n{output}"
    assert reason in output, f"the output lacks {reason!r}:\n{output}"
    assert "[x]" not in output, f"it ticks a requirement:\n{output}"


def test_last_step_equals_dockerfile_of_app():
    last, app = PROJECT / "steps" / "6" / "Dockerfile", PROJECT / "app" / "Dockerfile"
    assert last.read_text() == app.read_text(), "steps/6/Dockerfile differs from app/Dockerfile"
