"""Say more per pass, losing nothing: draft heads, trees, acceptance, decoding."""
