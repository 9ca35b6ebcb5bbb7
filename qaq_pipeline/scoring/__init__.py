"""From pairs to log-probabilities, through the score cache, and from log-probabilities to RMI and IFD."""
