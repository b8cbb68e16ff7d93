"""Checks of this machine, with a remedy for whatever does not work."""
