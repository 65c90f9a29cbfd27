"""Whole pipelines around forecasters, and the scorer of longitudinal forecasts."""
