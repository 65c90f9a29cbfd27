"""Heads that work together on one task: #12, #14, #21, #34, indirect objects, causal gates."""
