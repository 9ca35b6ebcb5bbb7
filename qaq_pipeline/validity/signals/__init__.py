"""The signals of validity, one module each."""
