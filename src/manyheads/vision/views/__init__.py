"""Representations from several views of one thing: what changes with the view, what does not, and sets that teach them."""
