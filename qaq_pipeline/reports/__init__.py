"""Reports about a batch or a version: summaries, plots and audit pages."""
