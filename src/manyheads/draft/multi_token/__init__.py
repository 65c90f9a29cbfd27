"""Heads of multi-token training (#1), as a drafter too."""
