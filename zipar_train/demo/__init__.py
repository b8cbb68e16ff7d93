"""A web page on which people watch a model generate images."""
