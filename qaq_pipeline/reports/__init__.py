"""What people read about a batch or a version: summaries, plots, audit pages."""
