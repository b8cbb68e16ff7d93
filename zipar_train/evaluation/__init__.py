"""How good a checkpoint is at each window: bits per code, generated images, scores, and advice on windows."""
