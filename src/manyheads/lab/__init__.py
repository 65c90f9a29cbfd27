"""Watching heads form, and models whose heads are known because they were built by hand."""
