"""Assets from scores to a decision about every row."""
