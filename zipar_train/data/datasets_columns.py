"""Columns of a `datasets` data set that hold images, labels or captions, chosen by their type and their name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

PICTURES = (
    "image",
    "images",
    "img",
    "picture",
    "photo",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "file_name",
    "filename",
    "image_path",
    "image_file",
    "filepath",
    "file_path",
    "path",
    "file",
)
LABELS = ("label", "labels", "class_id", "cls", "class", "class_label", "category", "target")
CAPTIONS = ("caption", "captions", "text", "prompt", "txt")


class Column(NamedTuple):
    """A column, or an entry of a column of dictionaries."""

    name: str
    entry: str | None
    feature: Any

    def of(self, row: dict[str, Any]) -> Any:
        value = row[self.name]
        return value if self.entry is None or value is None else value[self.entry]

    def __str__(self) -> str:
        return repr(self.name if self.entry is None else f"{self.name}.{self.entry}")


def picture_column(features: Any) -> Column | None:
    """Return the column of images, or of their bytes or paths, chosen by type, then by name; None if there is none."""
    import datasets

    held = [Column(name, None, feature) for name, feature in features.items()]
    images = [each for each in held if isinstance(each.feature, datasets.Image)]
    files = [each for each in held if _bytes(each.feature) or (is_text(each.feature) and each.name.lower() in PICTURES)]
    for some in (images, [each for each in files if _bytes(each.feature)], files):
        if some:
            return min(some, key=lambda each: _place(each.name, PICTURES))
    return None


def label_column(features: Any) -> Column | None:
    """Return the column of class labels, chosen by type, then by name; None if there is none."""
    import datasets

    held = _columns(features)
    classes = [each for each in held if isinstance(each.feature, datasets.ClassLabel)]
    named = [
        each
        for each in held
        if _place(each.entry or each.name, LABELS) < len(LABELS)
        and isinstance(each.feature, datasets.Value)
        and not _bytes(each.feature)
    ]
    for some in (classes, named):
        if some:
            return min(some, key=lambda each: (each.entry is not None, _place(each.entry or each.name, LABELS)))
    return None


def caption_column(features: Any, names: Sequence[str] = CAPTIONS) -> Column | None:
    """Return the column of captions, or of lists of captions, chosen by name; None if there is none."""
    import datasets

    lists = (datasets.List, datasets.LargeList)
    held = [
        each
        for each in _columns(features)
        if _place(each.entry or each.name, names) < len(names)
        and (is_text(each.feature) or (isinstance(each.feature, lists) and is_text(each.feature.feature)))
    ]
    return min(held, key=lambda each: (each.entry is not None, _place(each.entry or each.name, names)), default=None)


def is_text(feature: Any) -> bool:
    """Return True if a feature is text."""
    return getattr(feature, "dtype", "") in ("string", "large_string", "string_view")


def kind_of(feature: Any) -> str:
    """Return the type of a feature as text, for messages."""
    return str(feature.dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def _columns(features: Any) -> list[Column]:
    found = [Column(name, None, feature) for name, feature in features.items()]
    return found + [
        Column(name, entry, inner)
        for name, feature in features.items()
        if isinstance(feature, dict) and not _bytes(feature)
        for entry, inner in feature.items()
    ]


def _bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _bytes(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary", "binary_view")


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name.lower()) if name.lower() in names else len(names)
