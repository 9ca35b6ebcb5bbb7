"""Decides which pairs are valid, by signals whose cuts come from planted pairs of the same batch."""
