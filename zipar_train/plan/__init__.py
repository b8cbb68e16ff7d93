"""The decoding schedule: grids, plans, attention masks, and diagrams.

A plan defines which pass generates which code, and what each one attends to. Everything that depends on the window is
in this package.
"""
