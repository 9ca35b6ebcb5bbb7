"""The benchmark of the scoring engine: `python -m bench`."""
