"""What every reader of pictures returns: a numbered collection, each picture with its label or caption."""

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from zipar_train.data.labels import Names


class Source(NamedTuple):
    """A numbered collection of pictures, each with a label or a caption."""

    name: str  # in words
    keys: list[str]  # unique
    read: Callable[[int], tuple[Image.Image, Any]]  # raises whatever the file's decoder raises
    classes: int | None  # None: unknown, or captions
    names: Names | None = None  # of the labels 0, 1, ...; None: labels are class numbers
    empty: tuple[str, ...] = ()  # names that have no picture
    skipped: dict[str, str] = {}  # files that are not read, and why
    notes: tuple[str, ...] = ()  # what was chosen, for people
