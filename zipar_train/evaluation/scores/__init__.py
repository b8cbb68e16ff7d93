"""Scores of generated images: features, references, Frechet distances, classifier and CLIP scores."""
