"""Hidden chains of thought: reasoning steps compressed into one state (#96)."""
