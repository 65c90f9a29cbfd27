"""Training texts, the training of draft heads, and learned stopping (#91)."""
