"""Sweeps without a server: trials from W&B's sweep syntax, run locally, and their results."""
