"""Adaptive windows: rows that start when their first code passes verification."""
