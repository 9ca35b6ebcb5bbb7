"""The acceptance of validity: real pairs, some made bad, curated by the product; which of them it publishes."""
