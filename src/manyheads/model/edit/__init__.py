"""What changes a pass: edits of heads and rows, edits as files, and edits folded into the weights."""
