"""A run and its process: run folders, checkpoints, metrics, signals, ranks, and where a result came from."""
