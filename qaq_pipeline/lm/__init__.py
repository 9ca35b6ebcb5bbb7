"""Prompts, batches and the language models that score them. The only package that imports torch or transformers."""
