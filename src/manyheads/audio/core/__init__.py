"""What several systems of the room need, written once."""
