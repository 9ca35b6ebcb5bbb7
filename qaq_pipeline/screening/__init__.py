"""Screening of rows before scoring: duplicates, benchmark contamination, withdrawals and batch gates."""
