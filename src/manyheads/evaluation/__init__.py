"""Evaluation: controls with their p- and q-values, metrics, and comparisons of methods over data and seeds."""
