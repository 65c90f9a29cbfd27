"""Scores by layer and position: logit lens, patching maps; and composition of heads."""
