"""What looks at a pass: readers, the attention function, and what each head adds to the logits."""
