"""The name under which a transformers model takes a key-value cache."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import Cache

NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before; 5.40 drops the old name


def cache_arguments(body: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """Keyword arguments that give a model's body this cache, or say that it keeps none.

    Args:
        body: a transformers model without its head, or a module that is called like one.
        cache: None: nothing is kept.
    """
    return {"use_cache": False} if cache is None else {_name(type(body).forward): cache, "use_cache": True}


@lru_cache(maxsize=64)
def _name(forward: Callable[..., Any]) -> str:
    """The first of NAMES that a class's forward takes; its decorators keep the signature."""
    known = inspect.signature(forward).parameters
    found = [name for name in NAMES if name in known]
    assert found, f"{forward.__qualname__} takes none of {NAMES}: which argument is its cache now?"
    return found[0]
