"""Triton kernels of a forward pass with few rows, and the pass that is made of them."""
