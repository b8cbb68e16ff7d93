"""The command line: thin commands over functions that do the work."""

from zipar_train.cli.app import main

__all__ = ["main"]
