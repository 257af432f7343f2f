"""What the tests and the benchmark share; the files named test_* are what a reader opens."""

import pathlib

# The top folder, and the one that holds app, compose and tests; found, so that both may move.
REPOSITORY = next(
    folder for folder in pathlib.Path(__file__).parents if (folder / "pytest.ini").exists()
)
PROJECT = pathlib.Path(__file__).parents[2]
