"""Evaluation of a checkpoint at each window: bits per code, generated images, scores, and advice on windows."""
