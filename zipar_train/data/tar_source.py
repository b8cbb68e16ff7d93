"""Image sources in webdataset tars: files that share their name up to the first dot form a sample."""

import json
import tarfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from zipar_train.data import labels
from zipar_train.data.image_decoding import decode_image
from zipar_train.data.image_files import ENDINGS
from zipar_train.data.keys import unique_keys
from zipar_train.data.labels import LabelError
from zipar_train.data.source import Source
from zipar_train.io.files import regular
from zipar_train.io.untrusted_tar import entries

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")  # preferred extensions
LABELS, CAPTIONS = ("label", "cls", "class_id"), ("caption", "text")  # keys in a .json file


class _Place(NamedTuple):
    """The location of a file in a tar."""

    tar: Path
    start: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class _Sample(NamedTuple):
    name: str
    picture: _Place
    beside: dict[str, _Place]  # all files of the sample by extension


def tar_files(path: Path) -> list[Path]:
    """Return the tar files of a path: a file, a pattern or a folder; an empty list if it is something else.

    Raises:
        ValueError: If a tar file is missing or compressed.
    """
    import braceexpand

    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
        raise ValueError(f"--images {path}: compressed, and a tar is read in any order. Decompress it to a .tar first")
    if path.suffix != ".tar":
        return []
    found = [file for pattern in braceexpand.braceexpand(str(path)) for file in (sorted(glob(pattern)) or [pattern])]
    if missing := [file for file in found if not Path(file).is_file()]:
        raise ValueError(f"--images {path}: no file {missing[0]}")
    return [Path(file) for file in found]


def open_tars(tars: list[Path], name: str, captions: bool) -> Source:
    """Open the images of tars; each has its class in a .cls file or its caption in a .txt file, or either in a .json.

    Raises:
        ValueError: If a tar is damaged, or there are no images.
    """
    samples: list[_Sample] = []
    skipped: dict[str, str] = {}
    notes: list[str] = []
    for tar in tars:
        samples += _samples(tar, skipped, notes)
    if not samples:
        raise ValueError(f"--images: no pictures in {tars[0]}{' and the others' if len(tars) > 1 else ''}")
    names = None if captions or not _worded(samples[0]) else labels.words(map(_label_or_none, samples))

    def read(i: int) -> tuple[Any, Any]:
        wanted = _condition(samples[i].beside, captions)
        if names is not None:
            wanted = labels.place(names, wanted)
        return decode_image(samples[i].picture.read()), wanted

    keys = unique_keys([f"{sample.picture.tar.stem}/{sample.name}" for sample in samples])
    return Source(name, keys, read, None if names is None else len(names), names, skipped=skipped, notes=tuple(notes))


def _samples(tar: Path, skipped: dict[str, str], notes: list[str]) -> Iterator[_Sample]:
    """Yield the samples of a tar in its order; add files that belong to no sample to `skipped`."""
    groups: dict[str, dict[str, tuple[str, _Place]]] = {}
    for file, place in _files(tar, skipped, notes):
        folder, _, base = file.rpartition("/")
        key, _, kind = base.partition(".")
        kinds, kind = groups.setdefault(f"{folder}/{key}".lstrip("/"), {}), "." + kind.lower()
        if kind in kinds:
            skipped[f"{tar.stem}/{kinds[kind][0]}"] = f"{tar} has a later file of the same name, {file}"
        kinds[kind] = (file, place)
    for key, kinds in groups.items():
        pictures = sorted((kind for kind in kinds if kind in ENDINGS), key=lambda kind: kind not in PICTURES)
        dotted = [kind for kind in kinds if kind not in pictures and kind.endswith(tuple(ENDINGS))]
        beside = {kind: place for kind, (_, place) in kinds.items()}
        for kind in pictures[:1]:
            yield _Sample(key, beside[kind], beside)
        left = pictures[1:]
        for kind in dotted:  # `x.1.jpg`, `x.2.jpg`: each is a sample with the files of the same stem
            stem = kind.rpartition(".")[0]
            own = {"." + k.rpartition(".")[2]: place for k, place in beside.items() if k.rpartition(".")[0] == stem}
            if pictures and not own.keys() & {".cls", ".txt", ".json"}:
                left.append(kind)
            else:
                yield _Sample(key + stem, beside[kind], beside | own)
        for kind in left:
            skipped[f"{tar.stem}/{kinds[kind][0]}"] = f"its sample has the picture {kinds[pictures[0]][0]} already"
        if not pictures and not dotted:
            skipped[f"{tar.stem}/{key}"] = f"no picture: the files are {', '.join(file for file, _ in kinds.values())}"


def _files(tar: Path, skipped: dict[str, str], notes: list[str]) -> Iterator[tuple[str, _Place]]:
    """Yield the names and locations of the files of a tar, including hard links."""
    places: dict[str, _Place] = {}
    found: list[str] = []
    try:
        with tarfile.open(regular(tar), "r:") as archive:
            for member in entries(archive, found):
                if member.isdir():
                    continue
                base = member.name.rpartition("/")[2]
                hidden = any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/"))
                if member.islnk() and member.linkname in places:
                    place = places[member.linkname]
                elif not member.isreg() or member.issparse():
                    skipped[f"{tar.stem}/{member.name}"] = "a link to elsewhere, a device or a sparse file"
                    continue
                else:
                    place = _Place(tar, member.offset_data, member.size)
                if hidden or "." not in base:
                    skipped[f"{tar.stem}/{member.name}"] = "hidden" if hidden else "its name has no ending"
                    continue
                places[member.name] = place
                yield member.name, place
    except Exception as error:  # parsing untrusted bytes can raise almost any exception
        raise ValueError(
            f"--images: {tar} is not a readable, uncompressed tar file ({error}). Copy or make it again"
        ) from error
    notes += [f"{tar}: {note}" for note in found]


def _worded(sample: _Sample) -> bool:
    """Return True if a sample's class is a name, not a number."""
    return labels.words([_label_or_none(sample)]) is not None


def _label_or_none(sample: _Sample) -> Any:
    try:
        return _condition(sample.beside, captions=False)
    except (LabelError, OSError):
        return None


def _condition(beside: dict[str, _Place], captions: bool) -> Any:
    """Return the class or the caption of a sample, unconverted.

    Raises:
        LabelError: If there is none, or it cannot be read.
    """
    kind = ".txt" if captions else ".cls"
    try:
        if kind in beside:
            return beside[kind].read().decode("utf-8-sig").strip()
        held = json.loads(beside[".json"].read()) if ".json" in beside else {}
    except (ValueError, RecursionError) as error:
        raise LabelError(f"the {'caption' if captions else 'class'} beside it cannot be read ({error})") from None
    for name in CAPTIONS if captions else LABELS:
        if isinstance(held, dict) and held.get(name) is not None:
            return held[name]
    raise LabelError(f"no {'caption in a .txt' if captions else 'class in a .cls'} or .json beside it")
