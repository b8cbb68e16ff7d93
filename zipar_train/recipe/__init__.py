"""Recipes: the schema of a YAML file, its limits and defaults, and how it is found, overridden and checked."""
