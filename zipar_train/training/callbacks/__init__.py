"""What happens beside the steps: checkpoints, throughput, weight averages, sample images."""
