"""Heads that count on (#4): scores, ordinal features, sets, arithmetic, winning cases."""
