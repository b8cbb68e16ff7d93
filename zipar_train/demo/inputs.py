"""Checks of what people enter on the page; the API takes anything."""

import math
from typing import Any

MOST = 16  # images at once


def labels_of(prompt: Any, classes: int | None, images: int) -> list[Any]:
    """Return a class number or a caption for each image; of several class numbers, each in turn.

    Args:
        prompt: A caption, or class numbers with commas between them.
        classes: Number of the model's classes; None: it takes captions.
        images: B.

    Raises:
        ValueError: If there is none, one is not a number, or there are more than images.
    """
    text = str(prompt or "").strip()
    if classes is None:
        if not text:
            raise ValueError("the caption is empty: describe the image")
        return [text] * images
    given = [part.strip() for part in text.split(",") if part.strip()]
    if not given:
        raise ValueError(f"give a class number, 0 .. {classes - 1}")
    for part in given:
        if not (part.isascii() and part.isdigit() and len(part) < 10 and int(part) < classes):
            raise ValueError(f"{part!r} is not a class number: use 0 .. {classes - 1}, with commas between them")
    if len(given) > images:
        raise ValueError(f"{len(given)} class numbers for {images} images: ask for more images, or for fewer classes")
    return [int(given[k % len(given)]) for k in range(images)]


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a whole number in a range.

    Raises:
        ValueError: If the value is not one, as from a field that was emptied; names the field and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value % 1:
        raise ValueError(f"{name}: {value!r} is not a whole number. Use {least:,} .. {most:,}")
    if not least <= value <= most:
        raise ValueError(f"{name}: {value:,.0f} is out of range. Use {least:,} .. {most:,}")
    return int(value)
