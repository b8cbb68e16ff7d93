"""Data sets that the `datasets` library loads, from a folder, a file or the Hugging Face hub, and their splits."""

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from zipar_train.io.errors import truncate
from zipar_train.io.files import regular

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # metadata files of an image folder in `datasets`
SPLITS = ("train", "val", "test")
PLAIN = ("images", "image", "img", "imgs", "pictures", "photos", "data")  # names of folders that are not classes
FEW = 200  # files of a folder that are inspected to find out what it contains


class Table(NamedTuple):
    """One split of a data set."""

    rows: Any  # a datasets.Dataset
    split: str  # as the data set names it
    folders: tuple[Path, ...]  # candidate base folders of relative image paths


def is_table(path: Path) -> bool:
    """Return True if `datasets` should load a folder or file, False if it is a plain image folder.

    True for a saved data set, an image folder with metadata, and a folder of tables without image files. If a folder
    contains both images and tables that may contain images, the library decides.
    """
    if path.is_file():
        return _module(path) not in (None, "imagefolder", "webdataset")
    if not path.is_dir():
        return False
    if is_saved(path):
        return True
    kinds = {_module(file) for file in _few_files(path)}
    if "metadata" in kinds or "imagefolder" not in kinds:
        return bool(kinds & {"metadata", "parquet", "arrow", "csv", "json", "webdataset"})
    if not kinds & {"parquet", "arrow", "webdataset"}:
        return False
    import datasets

    try:
        return type(datasets.load_dataset_builder(str(path))).__module__.rpartition(".")[2] != "imagefolder"
    except Exception:  # the library fails; later code reports why the folder is not usable
        return False


def is_saved(path: Path) -> bool:
    """Return True if a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / file).is_file() for file in ("dataset_info.json", "state.json")
    )


def listing_of(path: Path, split: str) -> Path | None:
    """Return the table, such as `train.csv`, that lists the images of a split; None if folders are classes."""
    entries = sorted(each for each in path.iterdir() if not each.name.startswith("."))
    folders = [each.name.lower() for each in entries if each.is_dir()]
    known = [name for name in folders if name in PLAIN or any(matching([name], split) for split in SPLITS)]
    if len(known) < len(folders):
        return None
    tables = {each.stem: each for each in entries if each.is_file() and _module(each) in ("csv", "json")}
    found = matching(list(tables), split)
    return tables[found] if found is not None else None


def split_names(images: str) -> list[str]:
    """Return the split names of a data set; an empty list if it defines no splits.

    Raises:
        Exception: Any error of the library, its readers or the hub.
    """
    import datasets

    images, config = _configured(images)
    path = Path(images)
    if path.is_file():
        return []
    if (path / "dataset_dict.json").is_file():
        return list(datasets.load_from_disk(images))
    if is_saved(path):
        return []
    return [str(name) for name in datasets.get_dataset_split_names(images, config)]


def matching(names: Sequence[str], split: str) -> str | None:
    """Return the name among `names` that means this split; `val` also matches `validation`, `valid` and `dev`."""
    from datasets.data_files import SPLIT_KEYWORDS

    if split in names:
        return split
    alike = next(({str(key), *words} for key, words in SPLIT_KEYWORDS.items() if split in (str(key), *words)), set())
    return next((name for name in names if name.lower() in alike), None)


def load_table(images: str, split: str) -> Table:
    """Load a split of a data set.

    Raises:
        ValueError: If the split does not exist; names the existing ones.
        Exception: Any error of the library, its readers or the hub.
    """
    import datasets

    for file in _few_files(Path(images)):
        if _module(file) not in (None, "imagefolder"):
            regular(file)  # the library would block on a pipe
    names = split_names(images)
    images, config = _configured(images)
    path = Path(images)
    folders = (
        [path] if path.is_dir() else [path.parent, *sorted(each for each in path.parent.iterdir() if each.is_dir())]
    )
    chosen = matching(names, split) if names else split
    if chosen is None:
        raise ValueError(f"it has no split {split!r}, but {', '.join(names)}: give one of them as --split")
    if path.is_file():
        module = _module(path)
        assert module is not None
        kwargs: dict[str, Any] = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return Table(
            datasets.load_dataset(module, data_files=str(path), split="train", **kwargs), path.name, tuple(folders)
        )
    if is_saved(path):
        found: Any = datasets.load_from_disk(images)
        return Table(found[chosen] if names else found, chosen, tuple(folders))
    if path.is_dir():
        files = datasets.load_dataset_builder(images, config).config.data_files or {}
        of_split = [file for name, some in files.items() if str(name) == chosen for file in some]
        folders += sorted({Path(str(file)).parent for file in of_split})
    return Table(datasets.load_dataset(images, config, split=chosen), chosen, tuple(folders))


def reason(error: BaseException) -> str:
    """Return an error of the library as one line, with its cause."""
    said = truncate(" ".join(str(error).split()) or type(error).__name__, length=300)
    return said if error.__cause__ is None else f"{said}: {reason(error.__cause__)}"


def _configured(images: str) -> tuple[str, str | None]:
    """Split `owner/name:config` into a data set and its configuration; None if there is no configuration."""
    name, _, config = images.rpartition(":")
    return (name, config) if name and "/" not in config and not Path(images).exists() else (images, None)


def _module(file: Path) -> str | None:
    """Return the `datasets` module that reads a file, "metadata" for a metadata file, or None."""
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    if file.name in METADATA:
        return "metadata"
    return _EXTENSION_TO_MODULE.get(file.suffix.lower(), (None,))[0]


def _few_files(path: Path) -> list[Path]:
    """Return some files of a folder and its subfolders, breadth first, without hidden ones."""
    found: list[Path] = []
    level = [path]
    for _ in range(4):
        below: list[Path] = []
        for folder in level:
            found += [folder / name for name in METADATA if (folder / name).is_file()]
            with suppress(OSError), os.scandir(folder) as entries:
                for each in islice((each for each in entries if not each.name.startswith(".")), FEW):
                    (below if each.is_dir() else found).append(Path(each.path))
            if len(found) > 50 * FEW:
                return found
        level = sorted(below)
    return found
