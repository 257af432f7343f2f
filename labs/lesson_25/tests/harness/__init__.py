"""What the tests and the benchmark share; the files named test_* are what a reader opens."""
