"""Fine-tuning: the training objective, the trainer, checkpoints, and the memory estimate."""
