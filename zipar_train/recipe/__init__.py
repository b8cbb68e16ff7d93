"""Recipes: the schema of a YAML file with limits and defaults, and finding, overriding and checking recipes."""
