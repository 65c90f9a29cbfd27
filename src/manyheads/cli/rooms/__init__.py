"""The commands of the rooms: one file for each."""
