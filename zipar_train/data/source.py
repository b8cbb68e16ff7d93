"""The type that all image readers return: a numbered collection of images with labels or captions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from zipar_train.data.labels import Names


class Source(NamedTuple):
    """A numbered collection of images, each with a label or a caption."""

    name: str  # description for messages
    keys: list[str]  # unique
    read: Callable[[int], tuple[Image.Image, Any]]  # raises any exception of the file's decoder
    classes: int | None  # number of classes; None: unknown, or captions
    names: Names | None = None  # names of the labels 0, 1, ...; None: labels are class numbers
    empty: tuple[str, ...] = ()  # class names without an image
    skipped: dict[str, str] = {}  # skipped files and the reasons
    notes: tuple[str, ...] = ()  # messages for the user about what was chosen
