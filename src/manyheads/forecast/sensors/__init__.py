"""Forecasters of many sensors or auxiliary series: convolutions and state spaces over time, attention across variables."""
