"""Heads by their weights: their OV circuits, q, k and v, input norms, and edits folded into an ordinary checkpoint."""
