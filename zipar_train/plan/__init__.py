"""The schedule of codes: grids, the plan (which pass generates which code, and what each one attends to), masks, and a
diagram of both.

Everything that depends on the window is in this package.
"""
