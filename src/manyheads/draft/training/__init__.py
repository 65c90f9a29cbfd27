"""Texts to learn from, the training of draft heads, and learning when to stop (#91)."""
