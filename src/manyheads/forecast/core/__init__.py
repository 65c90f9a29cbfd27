"""What every forecaster shares: frames, windows, heads, training, backtests."""
