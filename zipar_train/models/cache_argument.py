"""The name of the key-value cache argument of transformers models."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import Cache

NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before; 5.40 removes the old name


def cache_arguments(body: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """Return the keyword arguments that pass a cache to a model's body, or disable caching.

    Args:
        body: A transformers model without its head, or a module with the same signature.
        cache: The cache; None disables caching.
    """
    return {"use_cache": False} if cache is None else {_name(type(body).forward): cache, "use_cache": True}


@lru_cache(maxsize=64)
def _name(forward: Callable[..., Any]) -> str:
    """Return the first of NAMES that is a parameter of a `forward` method; its decorators keep the signature."""
    known = inspect.signature(forward).parameters
    found = [name for name in NAMES if name in known]
    assert found, f"{forward.__qualname__} takes none of {NAMES}: which argument is its cache now?"
    return found[0]
