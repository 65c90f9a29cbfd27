"""Transformers over patches of series."""
