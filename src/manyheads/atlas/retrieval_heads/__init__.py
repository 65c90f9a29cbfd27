"""Heads that copy from far back (#11), and documents ranked by them (#17)."""
