"""What a concept does to a classifier (#70)."""
