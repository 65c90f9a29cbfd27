"""What a table of rows can be asked: who disagrees, what to trust where, which model, and what to change."""
