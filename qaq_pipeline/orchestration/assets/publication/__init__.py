"""Assets of the published dataset."""
