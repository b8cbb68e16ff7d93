"""Weights for others, with a model card."""
