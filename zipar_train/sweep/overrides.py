"""A trial's values as overrides of a recipe, from a sweep or from the command line of a W&B agent."""

import ast
from collections.abc import Mapping
from typing import Any

import yaml


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Return a trial's values as recipe overrides, `key.path=value`.

    A mapping sets only the keys it contains, like nested `parameters`; an agent's command line does not distinguish
    the two. Strings are parsed as YAML: "{8: 1}" is a mapping.
    """
    found = []
    for key, value in values.items():
        if isinstance(value, dict) and value and all(isinstance(k, str) and k.isidentifier() for k in value):
            found += overrides_of({f"{key}.{below}": v for below, v in value.items()})
        elif isinstance(value, str):
            found.append(f"{key}={value}")
        else:
            text = yaml.safe_dump(_numbered(value), default_flow_style=True, width=2**20, sort_keys=False)
            found.append(f"{key}={text.partition(chr(10) + '...')[0].strip()}")
    return found


def overrides_of_agent(arguments: list[str]) -> list[str]:
    """Return recipe overrides from a W&B agent's arguments, `key.path=value` with the value as a Python literal.

    Format: wandb/sdk/launch/sweeps/utils.py, create_sweep_command_args.
    """
    found = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        try:
            found += overrides_of({key: ast.literal_eval(text)})
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, yaml.YAMLError):  # left to the recipe
            found.append(argument)
    return found


def _numbered(value: Any) -> Any:
    """Return the value with numeric keys as integers, because JSON turns windows, which are keys, into strings."""
    if isinstance(value, dict):
        return {int(k) if isinstance(k, str) and k.isdecimal() else k: _numbered(v) for k, v in value.items()}
    return [_numbered(each) for each in value] if isinstance(value, list | tuple) else value
