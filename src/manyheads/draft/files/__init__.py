"""Drafters as folders: ours, and the layouts that other engines load."""
