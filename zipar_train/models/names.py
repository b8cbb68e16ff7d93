"""Renaming of tensors between published layouts, by tables of the beginnings of names."""

import re
from collections.abc import Sequence

Pairs = Sequence[tuple[str, str]]  # beginnings of a tensor's name in two layouts; `{}` stands for a number


def renamed(name: str, pairs: Pairs) -> str:
    """Return a tensor's name in the second layout of `pairs`; the first pair that fits counts, else it is unchanged."""
    for old, new in pairs:
        if match := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name):
            return new.format(*match.groups()) + name[match.end() :]
    return name


def reversed_pairs(pairs: Pairs) -> Pairs:
    """Return the table from the second layout to the first."""
    return tuple((new, old) for old, new in pairs)
