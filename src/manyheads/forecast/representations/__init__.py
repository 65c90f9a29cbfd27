"""Trunks that represent series: what they are alike, what is missing or odd in them, and which class they are of."""
