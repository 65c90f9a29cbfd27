"""Shared by all drafters: trees, growths, acceptance rules, the decoding loop."""
