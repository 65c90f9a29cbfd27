"""Heads of vision transformers (#40)."""
