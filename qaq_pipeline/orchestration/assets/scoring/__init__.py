"""Assets of one batch and one model."""
