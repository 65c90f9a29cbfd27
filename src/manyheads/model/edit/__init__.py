"""What changes a pass: edits of heads and rows, and edits as files."""
