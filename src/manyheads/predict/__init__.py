"""Heads on top of a trunk: output heads, reward heads, distillation and transfer, auxiliary heads that train the trunk."""
