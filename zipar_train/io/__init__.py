"""Reading and writing: files that appear whole or not at all, untrusted archives and URLs, console output, error texts.

Knows nothing of images or models.
"""
