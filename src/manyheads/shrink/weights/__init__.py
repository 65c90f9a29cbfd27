"""Fewer or other heads in the weights: pruned, routed, fused."""
