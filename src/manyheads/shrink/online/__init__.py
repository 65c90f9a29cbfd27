"""A new time step for the cost of one step; a prompt read by a smaller model."""
