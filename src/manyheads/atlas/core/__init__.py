"""What every behaviour stands on: its description, its inputs, its causal check, the atlas itself."""
