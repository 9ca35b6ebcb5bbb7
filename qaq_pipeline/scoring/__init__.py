"""Scores pairs under a model, with a score cache, and derives RMI and IFD from the log-probabilities."""
