"""Series trunks and forecast heads: a long data frame in, quantiles, a backtest and an explanation out."""
