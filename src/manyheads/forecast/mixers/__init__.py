"""Networks that mix channels without attention."""
