"""Every stored table: its columns, the closed vocabularies of its text columns, and the sources of each column."""
