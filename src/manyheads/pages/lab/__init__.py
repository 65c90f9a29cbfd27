"""Pages of the laboratory's tunings."""
