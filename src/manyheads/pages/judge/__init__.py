"""Pages of the judges."""
