"""Image sources that the `datasets` library loads, from a folder, a file or the Hugging Face hub."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from zipar_train.data import labels
from zipar_train.data.image_decoding import decode_image
from zipar_train.data.labels import LabelError
from zipar_train.data.source import Source
from zipar_train.io.errors import truncate
from zipar_train.io.files import regular

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
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # metadata files of an image folder in `datasets`
SPLITS = ("train", "val", "test")
PLAIN = ("images", "image", "img", "imgs", "pictures", "photos", "data")  # names of folders that are not classes
FEW = 200  # files of a folder that are inspected to find out what it contains


class Table(NamedTuple):
    """One split of a data set."""

    rows: Any  # a datasets.Dataset
    split: str  # as the data set names it
    folders: tuple[Path, ...]  # candidate base folders of relative image paths


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
        held = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
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

    how = " (the first of each list)" if captions and not _text(said.feature) else ""
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


def picture_column(features: Any) -> Column | None:
    """Return the column of images, or of their bytes or paths, chosen by type, then by name; None if there is none."""
    import datasets

    held = [Column(name, None, feature) for name, feature in features.items()]
    images = [each for each in held if isinstance(each.feature, datasets.Image)]
    files = [each for each in held if _bytes(each.feature) or (_text(each.feature) and each.name.lower() in PICTURES)]
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
        and (_text(each.feature) or (isinstance(each.feature, lists) and _text(each.feature.feature)))
    ]
    return min(held, key=lambda each: (each.entry is not None, _place(each.entry or each.name, names)), default=None)


def reason(error: BaseException) -> str:
    """Return an error of the library as one line, with its cause."""
    said = truncate(" ".join(str(error).split()) or type(error).__name__, length=300)
    return said if error.__cause__ is None else f"{said}: {reason(error.__cause__)}"


def _configured(images: str) -> tuple[str, str | None]:
    """Split `owner/name:config` into a data set and its configuration; None if there is no configuration."""
    name, _, config = images.rpartition(":")
    return (name, config) if name and "/" not in config and not Path(images).exists() else (images, None)


def _names(rows: Any, column: Column) -> labels.Names | None:
    """Return the class names of a column; None if its labels are numbers."""
    import datasets

    if isinstance(column.feature, datasets.ClassLabel):
        return tuple(column.feature.names)
    if column.entry is None:
        return labels.words(rows.unique(column.name))
    return labels.words(map(column.of, rows.select_columns([column.name])))


def _columns(features: Any) -> list[Column]:
    found = [Column(name, None, feature) for name, feature in features.items()]
    return found + [
        Column(name, entry, inner)
        for name, feature in features.items()
        if isinstance(feature, dict) and not _bytes(feature)
        for entry, inner in feature.items()
    ]


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


def _bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _bytes(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary", "binary_view")


def _text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string", "string_view")


def _kind(feature: Any) -> str:
    return str(feature.dtype) if type(feature).__name__ == "Value" else type(feature).__name__


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name.lower()) if name.lower() in names else len(names)


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
