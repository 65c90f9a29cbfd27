"""Edits that are learned from examples: #14, #30, #57."""
