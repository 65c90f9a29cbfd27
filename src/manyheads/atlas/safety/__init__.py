"""Heads that carry refusals (#113)."""
