"""Chains of thought as hidden states (#96)."""
