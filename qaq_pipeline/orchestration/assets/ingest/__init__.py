"""Assets from a delivery to screened rows."""
