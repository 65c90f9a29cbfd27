"""Drafters as folders: our layout, and those of other engines."""
