"""A given model tuned on a few texts: what else changes, and what does not."""
