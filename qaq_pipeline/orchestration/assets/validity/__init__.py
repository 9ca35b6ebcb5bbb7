"""Assets of validity: the cuts of the signals, and which pairs they declare invalid."""
