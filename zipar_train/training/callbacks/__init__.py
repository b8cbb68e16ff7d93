"""Lightning callbacks: checkpoints, throughput, weight averaging, sample images."""
