"""Output heads that compute fewer logits (#24)."""
