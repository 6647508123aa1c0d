"""The whole model: attach, choose, merge, save and load adapters."""
