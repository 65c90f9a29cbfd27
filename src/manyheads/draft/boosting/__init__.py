"""LLMBoost (#13): a chain of models in which each reads the states of the one before and learns to correct it."""
