"""The multiple-choice circuit (#12): which heads turn a known answer into its letter, one analysis a file."""
