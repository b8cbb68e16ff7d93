"""Sweeps without a server: trials from W&B's syntax, run here, and their results."""
