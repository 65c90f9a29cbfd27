"""What looks at a pass: readers, the attention function, and what each head adds to the logits."""

from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Activation, Keep, ReadAttention, Reader

__all__ = ["Activation", "AttentionCall", "Keep", "ReadAttention", "Reader"]
