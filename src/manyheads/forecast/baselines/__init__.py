"""What every forecaster has to beat: seasonal naive, and the models of statistics."""
