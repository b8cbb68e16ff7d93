"""Reading and writing: atomic file writes, strict YAML, untrusted archives and URLs, console output, error texts.

This package does not depend on images or models.
"""
