"""The report of an evaluation: its schema, tables, plots and HTML page."""
