"""Heads that are known by where they look: previous token, induction, n-grams, delimiters, copying."""
