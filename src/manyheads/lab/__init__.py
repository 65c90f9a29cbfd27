"""Experiments on how heads form, toy trunks, and models whose heads are known because they were built by hand."""
