"""Code that the tests and the benchmark share. The tests themselves are in the files test_*.py."""

import pathlib

# The repository root, and the directory of app, compose and tests. Found, so that both can move.
REPOSITORY = next(
    folder for folder in pathlib.Path(__file__).parents if (folder / "pytest.ini").exists()
)
PROJECT = pathlib.Path(__file__).parents[2]
