"""What attention can learn inside a prompt, where the theory gives the weights."""
