"""What every drafter stands on: trees, growths, acceptance, the decoding loop."""
