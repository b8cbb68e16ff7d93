"""A run and its process: run folders, checkpoints, metrics, signals, ranks and provenance."""
