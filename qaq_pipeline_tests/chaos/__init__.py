"""Attacks on the whole pipeline: its processes end at random, and what it stands on fails. `make chaos`."""
