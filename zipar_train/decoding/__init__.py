"""Generation: the decode loop with its key-value cache, sampling, CUDA graphs, and `Generator` for people."""
