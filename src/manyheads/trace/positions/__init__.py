"""Logit lens and patching maps by layer and position, and composition of heads."""
