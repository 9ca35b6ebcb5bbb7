"""From a published version back to its deliveries, and one row through all versions. Reads only."""
