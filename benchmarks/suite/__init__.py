"""The suite of speed: `python -m benchmarks` runs it, and compares two of its results."""
