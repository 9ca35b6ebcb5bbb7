"""Prompts, batches and the language models that score them: the only package that imports torch."""
