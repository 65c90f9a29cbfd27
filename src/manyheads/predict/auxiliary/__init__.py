"""Auxiliary heads and local learning: heads that exist to train the trunk, and are dropped afterwards."""
