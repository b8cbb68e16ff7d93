"""Reading and writing: atomic file writes, untrusted archives and URLs, console output, error texts.

This package does not depend on images or models.
"""
