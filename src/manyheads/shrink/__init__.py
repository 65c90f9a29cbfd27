"""The same model for less: smaller caches, fewer heads, other heads; and what it cost."""
