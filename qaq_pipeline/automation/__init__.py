"""Sensors and the schedule: what runs while the daemon runs."""
