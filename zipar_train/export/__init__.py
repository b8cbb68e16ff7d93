"""Export of weights for other software, with a model card."""
