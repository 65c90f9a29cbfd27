"""Passes that are kept and run again: sweeps, patching, edges, gradients layer by layer."""
