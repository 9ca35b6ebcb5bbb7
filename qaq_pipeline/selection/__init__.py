"""Strata and ranks, the frozen reference pool, the selection strategies, and the decision about every row."""
