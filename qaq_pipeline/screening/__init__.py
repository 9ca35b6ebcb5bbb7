"""Which rows are scored: duplicates, benchmark contamination, withdrawals, and the gates of a batch."""
