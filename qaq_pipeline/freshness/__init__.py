"""Which stored tables are stale, by their provenance."""
