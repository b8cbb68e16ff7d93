"""Generation: the decode loop, its key-value cache, sampling, CUDA graphs, and the user-facing `Generator`."""
