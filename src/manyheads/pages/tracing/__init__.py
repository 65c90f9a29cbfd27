"""Pages of what explains an answer."""
