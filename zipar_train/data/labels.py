"""Class labels: conversion to class numbers, and comparison of classes by name, not by position."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from zipar_train.io.errors import safe_repr, truncate

Names = tuple[str, ...]  # class k is names[k]
TOLD = 8  # most names in a message


class LabelError(ValueError):
    """An error for a sample whose label or caption cannot be used; its image may be intact."""


class Classes(NamedTuple):
    """The mapping from a source's labels to the model's class numbers."""

    numbers: tuple[int, ...] | None  # class number by source label; None: labels are class numbers
    names: Names | None  # class name by class number; None: classes have no names
    notes: tuple[str, ...] = ()  # messages for the user

    def number(self, label: Any) -> int:
        """Return the class number of a source's label.

        Raises:
            LabelError: If the label is not a class of the source.
        """
        found = number(label)
        if self.numbers is None:
            return found
        if not 0 <= found < len(self.numbers):
            raise LabelError(f"label {found} is outside 0 .. {len(self.numbers) - 1}")
        return self.numbers[found]


def number(label: Any) -> int:
    """Return the class number of a label: 7 for 7, 7.0, "7" and "007".

    Raises:
        LabelError: If the label is text, a bool, a fraction, or missing.
    """
    if isinstance(label, np.generic):
        label = label.item()
    if label is None or (isinstance(label, str) and not label.strip()):
        raise LabelError("there is no label")
    if isinstance(label, str) and re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", label.strip()):
        return int(label.strip().partition(".")[0])
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    if isinstance(label, float) and isfinite(label) and label == int(label):
        return int(label)
    raise LabelError(f"label {safe_repr(label)} is not a class number")


def caption(text: Any) -> str:
    """Return a stripped caption, or the first non-empty one of a list of captions.

    Raises:
        LabelError: If there is no caption.
    """
    if isinstance(text, list | tuple | np.ndarray):
        text = next((each for each in text if isinstance(each, str) and each.strip()), None)
    text = text.strip() if isinstance(text, str) else text
    if not isinstance(text, str) or not text:
        raise LabelError("there is no caption" if text is None else f"{safe_repr(text)} is not a caption")
    return text


def words(labels: Iterable[Any]) -> Names | None:
    """Return the sorted distinct labels as class names; None if all of them are numbers or missing."""
    held = {str(label).strip() for label in labels if label is not None and str(label).strip()}
    return None if all(map(_numeric, held)) else tuple(sorted(held))


def place(names: Names, label: Any) -> int:
    """Return the index of a label in the names that `words` returned.

    Raises:
        LabelError: If the label is not among them.
    """
    if str(label).strip() not in names:
        raise LabelError(f"there is no label ({safe_repr(label)})")
    return names.index(str(label).strip())


def _numeric(label: str) -> bool:
    """Return True if a label is a number, even one that is not a valid class number."""
    try:
        float(label)
    except ValueError:
        return False
    return True


def numbered(names: Sequence[str]) -> list[int] | None:
    """Return names as numbers; None if at least one of them is not a number.

    Raises:
        ValueError: If two names are the same number.
    """
    if not names or not all(re.fullmatch("[0-9]{1,18}", name) for name in names):
        return None
    found = [int(name) for name in names]
    for at, value in enumerate(found):
        if (first := found.index(value)) < at:
            raise ValueError(f"classes {names[first]!r} and {names[at]!r} are both number {value}: rename one of them")
    return found


def assign(
    names: Names | None,
    *,
    classes: int,
    where: str,
    empty: Iterable[str] = (),
    known: Names | None = None,
    known_of: str = "",
) -> Classes:
    """Assign class numbers to a source's labels.

    Names that are numbers keep their numbers. Other names are numbered in order, or as in another split.

    Args:
        names: Names of the source's labels 0, 1, ...; None: its labels are class numbers.
        classes: Number of the model's classes.
        where: The source, for messages.
        empty: Names without a sample.
        known: Class names of another split of the same data, by class number.
        known_of: Manifest of that split, for messages.

    Raises:
        ValueError: If the source's classes do not match the model's, or those of the other split.
    """
    if names is None:
        return Classes(None, None)
    empty = set(empty)
    used = [name for name in names if name not in empty]
    notes = [f"class folders without a picture: {listed(sorted(empty))}"] if empty else []
    numbers = numbered(used)
    if known is not None:
        theirs = _table(known)
        as_numbers = numbers is not None and numbered(known) is not None
        if as_numbers or numbers is None or set(used) <= set(known):
            ours = dict(zip(used, numbers if as_numbers and numbers else used, strict=True))
            if strange := [name for name in used if ours[name] not in theirs]:
                raise ValueError(
                    f"{where} has the class {strange[0]!r}, which {known_of} has not: its classes are {listed(known)}. "
                    "Give splits of one data set, or another --out"
                )
            table = {name: theirs[ours[name]] for name in used}
            notes += _absent(table, known)
            return Classes(tuple(table.get(name, -1) for name in names), known, tuple(notes))
        notes.append(f"its classes are numbers, taken for the places of {known_of}'s names ({listed(known)})")
    if numbers is not None and max(numbers) < classes:
        table = dict(zip(used, numbers, strict=True))
        notes += _absent(table, [str(k) for k in range(classes)])
        return Classes(tuple(table.get(name, -1) for name in names), None, tuple(notes))
    kept = used if len(used) == classes else list(names)
    if len(kept) != classes:
        outside = f" (class {max(numbers)} is outside 0 .. {classes - 1})" if numbers else ""
        later = (
            "" if numbers else ". A split that lacks some can be tokenized after one that has all, into the same --out"
        )
        raise ValueError(
            f"{where} has {len(used)} classes, the recipe's model {classes}{outside}. Give all classes, or set "
            f"model.num_classes. Classes found: {listed(used) or 'none'}{later}"
        )
    if (values := numbered(kept)) is not None:  # 1 .. N for a model of N classes
        kept = [name for _, name in sorted(zip(values, kept, strict=True))]
        notes.append(f"classes {kept[0]} .. {kept[-1]} are numbered 0 .. {classes - 1} in their order")
    table = {name: place for place, name in enumerate(kept)}
    return Classes(tuple(table.get(name, -1) for name in names), tuple(kept), tuple(notes))


def differ(a: Names | None, b: Names | None) -> str:
    """Describe the first difference between two lists of class names; empty if there is none, or if a list is None."""
    if a is None or b is None or a == b:
        return ""
    pairs = zip(a, b, strict=False)
    place = next((k for k, (one, other) in enumerate(pairs) if one != other), min(len(a), len(b)))
    one, other = (names[place] if place < len(names) else None for names in (a, b))
    return f"class {place} is {one!r} in one and {other!r} in the other"


def listed(names: Sequence[str]) -> str:
    """Return names as text for a message; only the first `TOLD` of many."""
    some = ", ".join(truncate(name, length=60) for name in names[:TOLD])
    return some if len(names) <= TOLD else f"{some}, ... ({len(names):,} in all)"


def _table(known: Names) -> Mapping[Any, int]:
    numbers = numbered(known)
    return {name: place for place, name in enumerate(numbers or known)}


def _absent(table: Mapping[str, int], names: Sequence[str]) -> list[str]:
    held = set(table.values())
    absent = [name for place, name in enumerate(names) if place not in held]
    return [f"{len(absent)} of {len(names)} classes have no picture: {listed(absent)}"] if absent else []
