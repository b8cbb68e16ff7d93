"""Where pictures come from: a folder a class, tar shards, a `datasets` data set, scikit-learn's digits."""

import json
import tarfile
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from zipar_train.files import regular
from zipar_train.keys import unique_keys
from zipar_train.picture_decoding import decode_image
from zipar_train.picture_files import named, picture_files

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Source(NamedTuple):
    """A numbered collection of pictures, each with a class or a caption."""

    name: str  # in words
    keys: list[str]  # unique
    read: Callable[[int], tuple[Image.Image, int | str]]  # raises whatever the file's decoder raises
    classes: int | None  # None: unknown, or captions
    skipped: dict[str, str] = {}  # files that are not read, by name, and why


def splits(images: str) -> tuple[str, ...]:
    """The splits a source has of its own accord."""
    if images == "digits" or all((Path(images) / split).is_dir() for split in ("train", "val")):
        return ("train", "val")
    return ("train",)


def open_source(images: str, split: str, *, captions: bool = False) -> Source:
    """A source by what `images` is, in a seeded random order, the same each time: folders and tars go class by class.

    Args:
        images: `digits`; a folder with a folder a class; tar files, also as a pattern ("imagenet-{000..127}.tar",
            "tars/*.tar") or a folder of them; or a `datasets` folder, saved data set or hub id.
        split: which part of it.
        captions: with the pictures' captions, not their classes, where there are both.

    Raises:
        ValueError: if it is none of these, or holds no pictures.
    """
    if images == "digits":
        return _digits(split)
    source = _open(images, split, captions)
    order = np.random.default_rng(0).permutation(len(source.keys)).tolist()
    return source._replace(keys=[source.keys[i] for i in order], read=lambda i: source.read(order[i]))


def _open(images: str, split: str, captions: bool) -> Source:
    path, name = Path(images), images
    if (path / split).is_dir():
        path, name = path / split, f"{images}, {split}"
    if tars := _tars(path):
        return _from_tars(tars, name, captions)
    saved = any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json"))
    if path.is_dir() and not saved and not any(path.glob("*.parquet")) and not any(path.glob("*.arrow")):
        return _from_folders(path, name)
    return _from_datasets(images, split, captions)


def _from_folders(path: Path, name: str) -> Source:
    """Pictures in a folder for each class, and in the folders in it."""
    skipped: dict[str, str] = {}
    files: list[tuple[Path, int]] = []
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    for label, folder in enumerate(classes):
        found = picture_files(path / folder, root=path)
        files += [(file, label) for file in found.files]
        skipped |= found.skipped
        if not found.files:
            reason = f" ({next(iter(found.skipped.values()))})" if found.skipped else ""
            raise ValueError(
                f"--images {path}: not a folder with a folder of pictures for each class: {folder} has none{reason}"
            )
    if not classes:
        raise ValueError(f"--images {path}: not a folder with a folder of pictures for each class: it has no folders")
    skipped |= {named(entry, path): "it lies in no class's folder" for entry in path.iterdir() if not entry.is_dir()}
    keys = unique_keys([str(file.relative_to(path).with_suffix("")) for file, _ in files])

    def read(i: int) -> tuple[Image.Image, int | str]:
        file, label = files[i]
        try:
            return decode_image(file), label
        except ValueError as error:
            raise ValueError(f"{named(file, path)}: {error}") from error

    return Source(name, keys, read, len(classes), skipped)


def _tars(path: Path) -> list[Path]:
    import braceexpand

    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.suffix != ".tar":
        return []
    found = [file for pattern in braceexpand.braceexpand(str(path)) for file in (sorted(glob(pattern)) or [pattern])]
    if missing := [file for file in found if not Path(file).is_file()]:
        raise ValueError(f"--images {path}: no file {missing[0]}")
    return [Path(file) for file in found]


def _from_tars(tars: list[Path], name: str, captions: bool) -> Source:
    """webdataset tars: a sample is the files that share their name up to the first dot."""
    samples: dict[tuple[int, str], dict[str, tuple[Path, int, int]]] = {}
    for number, tar in enumerate(tars):
        try:
            with tarfile.open(regular(tar), "r:") as archive:
                for member in archive:
                    file = Path(member.name).name
                    if member.isfile() and "." in file and not file.startswith("."):
                        folder = member.name[: -len(file)]
                        key, _, kind = file.partition(".")
                        place = (tar, member.offset_data, member.size)
                        samples.setdefault((number, folder + key), {})["." + kind.lower()] = place
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"--images: {tar} is not a readable, uncompressed tar file ({error})") from error
    kept = {key: files for key, files in samples.items() if any(kind in PICTURES for kind in files)}
    if not kept:
        raise ValueError(f"--images: no pictures in {tars[0]}{' and the others' if len(tars) > 1 else ''}")
    files = list(kept.values())

    def read(i: int) -> tuple[Image.Image, int | str]:
        kinds = files[i]
        picture = next(kind for kind in kinds if kind in PICTURES)
        return decode_image(_bytes(*kinds[picture])), _condition(kinds, captions)

    return Source(name, unique_keys([f"{tars[number].stem}/{key}" for number, key in kept]), read, None)


def _bytes(path: Path, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _condition(kinds: dict[str, tuple[Path, int, int]], captions: bool) -> int | str:
    if ".cls" in kinds and not captions:
        return int(_bytes(*kinds[".cls"]))
    if ".txt" in kinds and captions:
        return _bytes(*kinds[".txt"]).decode().strip()
    held = json.loads(_bytes(*kinds[".json"])) if ".json" in kinds else {}
    for name in ("caption", "text") if captions else ("label", "cls", "class_id"):
        if isinstance(held.get(name), str if captions else int):
            return held[name]
    raise ValueError(f"no {'caption in a .txt' if captions else 'class in a .cls'} or .json beside it")


def _from_datasets(images: str, split: str, captions: bool) -> Source:
    import datasets

    try:
        if (Path(images) / "dataset_info.json").is_file() or (Path(images) / "dataset_dict.json").is_file():
            found: Any = datasets.load_from_disk(images)
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(images, split=split)
    except Exception as error:  # of the hub, its network, the data set's own reader
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--images {images}: neither a folder with a folder of pictures for each class, nor tar files, nor a data "
            f"set with a split {split!r} that `datasets` can load ({reason})"
        ) from error
    pictures = [name for name, kind in found.features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in found.features.items() if isinstance(kind, datasets.ClassLabel) and not captions]
    known = ("caption", "captions", "text", "prompt") if captions else ("label", "labels", "class_id", "cls")
    labels += [name for name in known if name in found.features]
    if not pictures or not labels:
        held = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in found.features.items())
        wanted = "captions" if captions else "classes"
        raise ValueError(f"--images {images}: needs a column of pictures and one of {wanted}, but has {held}")
    kind = found.features[labels[0]]
    found = found.cast_column(pictures[0], datasets.Image(decode=False))  # its own decoder runs programs, for EPS say

    def read(i: int) -> tuple[Image.Image, int | str]:
        row = found[i]
        held = row[pictures[0]]
        return decode_image(held["bytes"] if held["bytes"] is not None else Path(held["path"])), row[labels[0]]

    classes = kind.num_classes if isinstance(kind, datasets.ClassLabel) else None
    return Source(f"{images}, {split} split", [f"{i:08d}" for i in range(len(found))], read, classes)


def _digits(split: str) -> Source:
    """scikit-learn's 1,797 digits: every fifth of a seeded shuffle of each class is held out as `val`."""
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

    def read(i: int) -> tuple[Image.Image, int | str]:
        grey = (data.images[chosen[i]] * 255 / 16).round().astype(np.uint8)
        return Image.fromarray(grey), int(data.target[chosen[i]])

    return Source(f"scikit-learn digits, {split} split", [f"digit{i:04d}" for i in chosen], read, 10)
