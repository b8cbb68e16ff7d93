"""Class labels: which number a label means, and classes that are compared by name, never by position."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from zipar_train.io.errors import safe_repr, truncate

Names = tuple[str, ...]  # class k is names[k]
TOLD = 8  # names in a message


class LabelError(ValueError):
    """A sample has a label or a caption that cannot be used; its picture may be whole."""


class Classes(NamedTuple):
    """How a source's labels become the model's class numbers."""

    numbers: tuple[int, ...] | None  # by the source's label; None: labels are class numbers
    names: Names | None  # by class number; None: numbers alone
    notes: tuple[str, ...] = ()  # for people

    def number(self, label: Any) -> int:
        """The class number of a source's label.

        Raises:
            LabelError: for a label that is no class of the source.
        """
        found = number(label)
        if self.numbers is None:
            return found
        if not 0 <= found < len(self.numbers):
            raise LabelError(f"label {found} is outside 0 .. {len(self.numbers) - 1}")
        return self.numbers[found]


def number(label: Any) -> int:
    """The class number that a label says: 7, 7.0, "7" and "007" say 7.

    Raises:
        LabelError: for text, a truth value, a fraction, or no label at all.
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
    raise LabelError(f"label {safe_repr(label)} is no class number")


def caption(text: Any) -> str:
    """A caption without white space around it; of a list of captions the first that is not empty.

    Raises:
        LabelError: if there is none.
    """
    if isinstance(text, list | tuple | np.ndarray):
        text = next((each for each in text if isinstance(each, str) and each.strip()), None)
    text = text.strip() if isinstance(text, str) else text
    if not isinstance(text, str) or not text:
        raise LabelError("there is no caption" if text is None else f"{safe_repr(text)} is no caption")
    return text


def words(labels: Iterable[Any]) -> Names | None:
    """The sorted names that labels are; None: all of them are numbers, or missing."""
    held = {str(label).strip() for label in labels if label is not None and str(label).strip()}
    return None if all(map(_numeric, held)) else tuple(sorted(held))


def place(names: Names, label: Any) -> int:
    """The place of a label among the names of `words`.

    Raises:
        LabelError: if it is none of them.
    """
    if str(label).strip() not in names:
        raise LabelError(f"there is no label ({safe_repr(label)})")
    return names.index(str(label).strip())


def _numeric(label: str) -> bool:
    """Whether a label is a number, be it one that no class has."""
    try:
        float(label)
    except ValueError:
        return False
    return True


def numbered(names: Sequence[str]) -> list[int] | None:
    """The numbers that names are; None: at least one is a word.

    Raises:
        ValueError: if two names are the same number.
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
    """The class numbers of a source's labels.

    Names that are numbers keep them. Other names are numbered in their order, or as another split's are.

    Args:
        names: of the source's labels 0, 1, ...; None: its labels are class numbers.
        classes: of the model.
        where: the source, for messages.
        empty: those of the names that have no sample.
        known: of another split of the same data, by class number.
        known_of: that split's manifest, for messages.

    Raises:
        ValueError: if the source's classes are not the model's, or not the other split's.
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
    """In what two sets of class names differ, in words; empty: they do not, or one of them has none."""
    if a is None or b is None or a == b:
        return ""
    pairs = zip(a, b, strict=False)
    place = next((k for k, (one, other) in enumerate(pairs) if one != other), min(len(a), len(b)))
    one, other = (names[place] if place < len(names) else None for names in (a, b))
    return f"class {place} is {one!r} in one and {other!r} in the other"


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few of many."""
    some = ", ".join(truncate(name, length=60) for name in names[:TOLD])
    return some if len(names) <= TOLD else f"{some}, ... ({len(names):,} in all)"


def _table(known: Names) -> Mapping[Any, int]:
    numbers = numbered(known)
    return {name: place for place, name in enumerate(numbers or known)}


def _absent(table: Mapping[str, int], names: Sequence[str]) -> list[str]:
    held = set(table.values())
    absent = [name for place, name in enumerate(names) if place not in held]
    return [f"{len(absent)} of {len(names)} classes have no picture: {listed(absent)}"] if absent else []
