"""Key/value caches whose heads keep different tokens, and the methods that choose which."""
