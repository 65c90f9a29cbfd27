"""Frozen language models as trunks of forecasters: one file for each method, `frozen.py` for what they share."""
