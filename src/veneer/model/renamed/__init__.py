"""Adapters that name weights as an older version of their model did: where those are now (decision 0006)."""
