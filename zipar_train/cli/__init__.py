"""The command line: one file per command, each a few lines over a function that does the work."""

from zipar_train.cli.app import main

__all__ = ["main"]
