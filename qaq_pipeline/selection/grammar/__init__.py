"""The grammar of selections: conditions, caps and quotas, the same for every strategy."""
