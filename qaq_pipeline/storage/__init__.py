"""Everything that is stored, on a local disk or an object store: bytes, tables, cached scores, deliveries, locks."""
