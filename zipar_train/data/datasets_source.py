"""Image sources that the `datasets` library loads: a column of images, and one of labels or captions."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zipar_train.data import labels
from zipar_train.data.datasets_columns import Column, caption_column, is_text, kind_of, label_column, picture_column
from zipar_train.data.datasets_loading import load_table, reason
from zipar_train.data.image_decoding import decode_image
from zipar_train.data.labels import LabelError
from zipar_train.data.source import Source


def open_table(images: str, split: str, captions: bool) -> Source:
    """Open a split of a data set as an image source.

    Raises:
        ValueError: If the library cannot load it, or if it has no column of images, labels or captions.
    """
    import datasets

    try:
        table = load_table(images, split)
    except Exception as error:  # from the hub, the network, or the data set's own reader
        raise ValueError(
            f"--images {images}: neither a folder with a folder of pictures for each class, nor tar files, nor a data "
            f"set with a split {split!r} that `datasets` can load ({reason(error)})"
        ) from error
    features = table.rows.features
    picture, said = picture_column(features), (caption_column if captions else label_column)(features)
    if picture is None or said is None:
        held = ", ".join(f"{name} ({kind_of(feature)})" for name, feature in features.items())
        wanted = "captions" if captions else "classes"
        raise ValueError(f"--images {images}: needs a column of pictures and one of {wanted}, but has {held}")
    rows = table.rows.select_columns(list(dict.fromkeys((picture.name, said.name))))
    if isinstance(picture.feature, datasets.Image):
        rows = rows.cast_column(picture.name, datasets.Image(decode=False))
    names = None if captions else _names(rows, said)
    worded = names is not None and not isinstance(said.feature, datasets.ClassLabel)

    def read(i: int) -> tuple[Any, Any]:
        row = rows[i]
        wanted = said.of(row)
        if wanted is None:
            raise LabelError(f"there is no {'caption' if captions else 'label'}")
        if names is not None and worded:
            wanted = labels.place(names, wanted)
        return decode_image(_content(picture.of(row), table.folders)), wanted

    how = " (the first of each list)" if captions and not is_text(said.feature) else ""
    how = f" (sorted names: {labels.listed(names)})" if names is not None and worded else how
    what = "captions" if captions else "classes"
    notes = [f"split {table.split!r}: pictures in column {picture}, {what} in column {said}{how}"]
    return Source(
        f"{images}, {table.split} split",
        [f"{i:08d}" for i in range(len(rows))],
        read,
        None if names is None else len(names),
        names,
        notes=tuple(notes),
    )


def _names(rows: Any, column: Column) -> labels.Names | None:
    """Return the class names of a column; None if its labels are numbers."""
    import datasets

    if isinstance(column.feature, datasets.ClassLabel):
        return tuple(column.feature.names)
    if column.entry is None:
        return labels.words(rows.unique(column.name))
    return labels.words(map(column.of, rows.select_columns([column.name])))


def _content(value: Any, folders: Sequence[Path]) -> Path | bytes:
    """Return the bytes of an image, or the path of its file."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not value:
        raise ValueError("there is no picture")
    if re.match(r"[a-z0-9]+://", str(value)):
        from datasets.utils.file_utils import xopen

        with xopen(str(value), "rb") as file:
            return file.read()
    places = [folder / Path(str(value)).expanduser() for folder in folders]
    return next((place for place in places if place.exists()), places[0])
