"""Contextual decomposition (#9): one forward pass on split activations."""
