"""What is optimised while a model answers (#83)."""
