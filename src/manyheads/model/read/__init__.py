"""What looks at a pass: readers, the attention function, what each head adds to the logits, and heads by their weights."""
