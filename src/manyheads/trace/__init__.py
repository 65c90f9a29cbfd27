"""Why this answer? Attribution, patching, decomposition, circuits, sparse autoencoders."""
