"""The pipeline as Dagster definitions: assets, checks, conditions, jobs, resources."""
