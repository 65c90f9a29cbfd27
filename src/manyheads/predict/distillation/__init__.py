"""Distillation: a teacher, labels, and a head for each."""
