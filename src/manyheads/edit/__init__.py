"""Make it behave otherwise: edits of heads that can be saved, shared, composed, undone and baked."""
