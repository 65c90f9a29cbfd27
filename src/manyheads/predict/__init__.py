"""Predict: heads on top of a trunk. Output heads, reward heads, distillation and transfer, auxiliary heads that train the trunk."""
