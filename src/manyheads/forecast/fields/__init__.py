"""Fields on a grid of latitudes and longitudes: trunks that read whole fields, and models from observations to forecasts."""
