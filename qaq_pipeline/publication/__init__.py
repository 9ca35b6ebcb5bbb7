"""Versions of the published dataset: manifest, training files, dataset card, and their way to a hub."""
