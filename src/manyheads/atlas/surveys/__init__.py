"""All behaviours of a model in one sweep, and two atlases side by side."""
