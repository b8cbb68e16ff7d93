"""Search for image files in a folder, with a reason for every file that is skipped."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from zipar_train.data.image_decoding import FORMATS, refusal
from zipar_train.io.errors import printable
from zipar_train.io.files import regular

ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}


class Found(NamedTuple):
    """The files of a folder and its subfolders."""

    files: list[Path]  # possible images, sorted by folder, then by name
    skipped: dict[str, str]  # all other files, relative to `root` and printable: the reason


def picture_files(folder: Path, *, root: Path) -> Found:
    """Find possible image files in a folder and its subfolders, including linked ones; each folder is read once.

    A file with an image extension is assumed to be an image until it is decoded. Other files are judged by their first
    bytes.

    Args:
        root: Base folder of the names in `skipped`: `folder` or one of its parents.

    Raises:
        OSError: If the folder itself cannot be listed.
    """
    found: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for place, entries in _folders(folder, root, skipped):
        hidden = _hidden(place, root)
        for entry in entries:
            if reason := "in a hidden folder" if hidden else _reason(entry):
                skipped[named(entry.path, root)] = reason
            else:
                found.setdefault(place, []).append(entry.path)
    return Found([Path(file) for place in sorted(found) for file in sorted(found[place])], skipped)


def named(file: str | Path, root: Path) -> str:
    """Return a file's path relative to `root` as one line of valid Unicode, unique to this file."""
    return printable(str(Path(file).relative_to(root)).replace("\\", "\\\\"))


def _folders(folder: Path, root: Path, skipped: dict[str, str]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield the folder and its subfolders, each with its entries that are not folders; links to folders come last.

    A hidden link to a folder is not followed; it counts as a file.
    """
    holders = list(root.resolve().parents) + ([root.resolve()] if folder != root else [])
    seen = {(status.st_dev, status.st_ino): "that holds it" for status in (holder.stat() for holder in holders)}
    waiting, links = deque([str(folder)]), deque[str]()
    while waiting or links:
        place = (waiting or links).popleft()
        try:
            status = os.stat(place)
            with os.scandir(place) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            if place == str(folder):
                raise
            skipped[named(place, root)] = f"a folder that cannot be listed ({error.strerror})"
            continue
        hidden = _hidden(place, root)
        if not hidden:
            if reason := seen.get((status.st_dev, status.st_ino)):
                skipped[named(place, root)] = f"a link to a folder {reason}"
                continue
            seen[status.st_dev, status.st_ino] = "that is read already"
        files = []
        for entry in entries:
            if not _is_folder(entry) or (entry.is_symlink() and (hidden or entry.name.startswith("."))):
                files.append(entry)
            else:
                (links if entry.is_symlink() else waiting).append(entry.path)
        yield place, files


def _hidden(place: str, root: Path) -> bool:
    return any(part.startswith(".") for part in Path(place).relative_to(root).parts)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _reason(entry: os.DirEntry[str]) -> str | None:
    """Return why a directory entry is skipped; None if it may be an image."""
    try:
        if entry.is_dir():
            return "a hidden link to a folder"
        if not entry.is_file():
            regular(Path(entry.path))
    except OSError as error:
        return f"not a file that can be read ({error.strerror or error})"
    return None if Path(entry.name).suffix.lower() in ENDINGS else refusal(Path(entry.path))
