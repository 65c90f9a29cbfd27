"""Pages of the brain room."""
