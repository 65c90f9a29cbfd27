"""Which way heads look: found in pictures, and learned from few labels."""
