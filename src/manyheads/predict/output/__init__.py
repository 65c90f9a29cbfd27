"""Output heads: what stands in for a linear layer over classes, bins or numbers."""
