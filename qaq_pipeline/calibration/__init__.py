"""Validates the scores on pairs that are made bad on purpose."""
