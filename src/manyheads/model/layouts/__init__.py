"""How a model's layout is found: inputs small enough to try, a pass that is watched, and what was added to what in it."""
