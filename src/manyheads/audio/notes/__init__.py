"""From sound to notes: Basic Pitch (#64), from the samples to a MIDI file."""
