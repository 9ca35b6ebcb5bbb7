"""The asset of the training trial."""
