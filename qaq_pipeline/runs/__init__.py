"""Runs started from this process: a new batch, a refresh of stale batches, and what is reported about them."""
