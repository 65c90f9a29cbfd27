"""Heads that recall facts, or take them from the context: #8, #75, #82."""
