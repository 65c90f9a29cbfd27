"""Reward heads: scores learned from ratings and from preferences."""
