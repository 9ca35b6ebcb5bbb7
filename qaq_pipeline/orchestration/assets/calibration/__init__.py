"""Assets of the validation by planted defects."""
