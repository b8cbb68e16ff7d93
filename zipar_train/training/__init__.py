"""Fine-tuning: the training objective, the trainer, checkpoints, and the estimate of memory."""
