"""Browse the rows of a batch or a version on pages of a server on this machine."""
