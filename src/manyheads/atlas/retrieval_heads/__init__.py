"""Heads that copy from far back (#11), and what they say of documents (#17)."""
