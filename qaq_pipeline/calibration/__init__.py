"""Validates the scores by planted defects: pairs that are made bad on purpose and scored like the others."""
