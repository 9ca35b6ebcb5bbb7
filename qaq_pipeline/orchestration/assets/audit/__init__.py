"""Assets of the audit pages."""
