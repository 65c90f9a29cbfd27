"""Sparse autoencoders of attention outputs (#10)."""
