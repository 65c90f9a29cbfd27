"""Distillation and transfer: two heads on one trunk, probing before tuning, what a head does to the features below it."""
