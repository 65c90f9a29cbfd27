"""The effect of a concept on a classifier's answers (#70)."""
