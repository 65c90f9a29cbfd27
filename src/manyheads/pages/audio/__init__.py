"""Pages of what was heard."""
