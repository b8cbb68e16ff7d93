"""Image sources: one folder per class, tar shards, a `datasets` data set, scikit-learn's digits."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zipar_train.data.datasets_loading import SPLITS, is_saved, is_table, listing_of, matching, split_names
from zipar_train.data.datasets_source import open_table
from zipar_train.data.image_decoding import decode_image
from zipar_train.data.image_files import named, picture_files
from zipar_train.data.keys import unique_keys
from zipar_train.data.source import Source
from zipar_train.data.tar_source import open_tars, tar_files
from zipar_train.io.errors import printable

__all__ = ["Source", "open_source", "splits"]


def splits(images: str) -> tuple[str, ...]:
    """Return the splits that a source defines: train and val, under any of their names, or train alone."""
    if images == "digits":
        return ("train", "val")
    try:
        path = Path(images)
        names = split_names(images) if is_table(path) else _split_folders(path)
        if not names and path.is_dir():
            names = [split for split in SPLITS if listing_of(path, split)]
    except Exception:  # `open_source` reports errors of the library
        names = []
    return ("train", "val") if matching(names, "train") and matching(names, "val") else ("train",)


def open_source(images: str, split: str, *, captions: bool = False) -> Source:
    """Open an image source in a fixed random order, because folders and tars are sorted by class.

    Args:
        images: `digits`; a folder with one folder per class; tar files, also as a pattern ("imagenet-{000..127}.tar",
            "tars/*.tar") or a folder of them; or a `datasets` folder, saved data set or hub id.
        split: Name of the split.
        captions: Use captions, not classes, if a source has both.

    Raises:
        ValueError: If `images` is none of these, or contains no images.
    """
    if images == "digits":
        return _digits(split)
    source = _open(images, split, captions)
    order = np.random.default_rng(0).permutation(len(source.keys)).tolist()
    return source._replace(keys=[source.keys[i] for i in order], read=lambda i: source.read(order[i]))


def _open(images: str, split: str, captions: bool) -> Source:
    path = Path(images)
    folders = _split_folders(path, split)
    found = matching(folders, split)
    part, name = (path, images) if found is None else (path / found, f"{images}, {found}")
    notes = (f"split {split!r}: folder {found!r}",) if found not in (None, split) else ()
    if tars := tar_files(part):
        opened = open_tars(tars, name, captions)
        return opened._replace(notes=(*notes, *opened.notes))
    saved = matching([each for each in _folders(path) if is_saved(path / each)], split)
    if saved is not None:
        return open_table(str(path / saved), split, captions)
    if is_table(path) or not path.is_dir() or not _folders(path):
        return open_table(images, split, captions)
    if found is None and (listing := listing_of(path, split)):
        return open_table(str(listing), split, captions)
    if found is None and matching(folders, "train"):
        raise ValueError(f"--images {images}: no folder for --split {split}. Give one of {', '.join(folders)}")
    return _from_folders(part, name)._replace(notes=notes)


def _split_folders(path: Path, split: str = "train") -> list[str]:
    """Return the names of folders that are splits; a folder without subfolders or tars is a class."""
    named = [each for each in _folders(path) if any(matching([each], known) for known in (split, *SPLITS))]
    return [each for each in named if any(one.is_dir() or one.suffix == ".tar" for one in (path / each).iterdir())]


def _folders(path: Path) -> list[str]:
    """Return the sorted names of a folder's visible subfolders."""
    if not path.is_dir():
        return []
    return sorted(name for name in os.listdir(path) if not name.startswith(".") and os.path.isdir(path / name))


def _from_folders(path: Path, name: str) -> Source:
    """Open a folder with one subfolder per class, in the order of their names."""
    skipped: dict[str, str] = {}
    files: list[tuple[Path, int]] = []
    classes = _folders(path)
    for label, folder in enumerate(classes):
        found = picture_files(path / folder, root=path)
        files += [(file, label) for file in found.files]
        skipped |= found.skipped
    for entry in path.iterdir():
        if entry.name not in classes:
            skipped[named(entry, path)] = "hidden" if entry.is_dir() else "it lies in no class's folder"
    seen = {label for _, label in files}
    empty = tuple(printable(folder) for label, folder in enumerate(classes) if label not in seen)
    if not files:
        reason = next((f"{name}: {why}" for name, why in skipped.items()), "it has no folders")
        raise ValueError(f"--images {path}: not a folder with a folder of pictures for each class ({reason})")
    keys = unique_keys([str(file.relative_to(path).with_suffix("")) for file, _ in files])

    def read(i: int) -> tuple[Image.Image, Any]:
        file, label = files[i]
        try:
            return decode_image(file), label
        except ValueError as error:
            raise ValueError(f"{named(file, path)}: {error}") from error

    return Source(name, keys, read, len(classes), tuple(map(printable, classes)), empty, skipped)


def _digits(split: str) -> Source:
    """Open scikit-learn's 1,797 digits; every fifth image of a seeded shuffle of each class is held out as `val`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "scikit-learn holds the digits and is not installed: pip install 'zipar-train[digits]'"
        ) from error
    if split not in ("train", "val"):
        raise ValueError(f"--split {split!r} is unknown: the digits have train and val")
    data = load_digits()
    held_out = np.zeros(len(data.target), dtype=bool)
    rng = np.random.default_rng(0)
    for label in range(10):
        held_out[rng.permutation(np.flatnonzero(data.target == label))[::5]] = True
    chosen = np.flatnonzero(held_out == (split == "val"))

    def read(i: int) -> tuple[Image.Image, Any]:
        grey = (data.images[chosen[i]] * 255 / 16).round().astype(np.uint8)
        return Image.fromarray(grey), int(data.target[chosen[i]])

    return Source(f"scikit-learn digits, {split} split", [f"digit{i:04d}" for i in chosen], read, 10)
