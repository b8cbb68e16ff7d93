"""Codes that other projects made, to shards: LlamaGen's folders, RandAR's tar, 1d-tokenizer's (RAR's) lines of JSON."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zipar_train.files import regular
from zipar_train.keys import unique_keys
from zipar_train.sections import Recipe
from zipar_train.shards import Layout, Manifest, Sample, write_shards
from zipar_train.wording import printable


class Codes(NamedTuple):
    """Somebody's codes, recognised."""

    kind: str  # whose, in words
    images: int
    read: Callable[[int], tuple[str, NDArray[Any], int]]  # key, codes (A, N), class


def import_codes(
    recipe: Recipe,
    *,
    codes: str | Path,
    out: str | Path,
    split: str = "train",
    progress: Callable[..., Any] | None = None,
) -> Manifest:
    """Write codes that others made as `out`/`split`.json and its shards.

    Args:
        codes: a LlamaGen code folder (with `imagenet384_codes` and `imagenet384_labels` in it), a RandAR tar or the
            folder it unpacks to, or a 1d-tokenizer `.jsonl`.
        progress: wraps the array of numbers that are read, one after another.

    Raises:
        ValueError: for an unknown format, a damaged file, or codes that do not fit the recipe's grid and codebook.
    """
    model = recipe.model
    height, width = model.grid
    if model.classes is None:
        raise ValueError(f"recipe {recipe.name} is prompted by captions, and imported codes have classes")
    found, manifest = recognise(Path(codes)), Path(out) / f"{split}.json"
    if manifest.exists():
        raise ValueError(f"{manifest} already exists: give another --out or --split, or remove it")
    layout = Layout(
        source=f"{found.kind}: {printable(Path(codes).name)}", grid=(height, width), codes=model.codes,
        classes=model.classes, views="as imported",
    )  # fmt: skip

    def samples() -> Iterator[Sample]:
        order: Any = np.random.default_rng(0).permutation(found.images)  # theirs goes class by class
        for i in progress(order) if progress else order:
            key, rows, label = found.read(int(i))
            if rows.shape[-1] != height * width:
                raise ValueError(
                    f"{codes}, {key}: {rows.shape[-1]} codes an image, but the recipe's grid of {height}x{width} has "
                    f"{height * width}. Use the recipe these codes are for, or set model.grid"
                )
            yield Sample(key, rows.reshape(-1, height, width), label)

    try:
        if _foreign_codebook(found, model.codes):
            raise ValueError(
                f"{codes}: all codes are below 1,024, as those of MaskGIT-VQGAN are, and the recipe's codebook has "
                f"{model.codes}. Import them for a model of that tokenizer, with model.codes=1024"
            )
        return write_shards(samples(), manifest, layout=layout)
    except (json.JSONDecodeError, tarfile.TarError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{codes} is damaged ({type(error).__name__}: {error}). Copy or download it again") from error


def recognise(path: Path) -> Codes:
    """Whose codes these are.

    Raises:
        ValueError: if nobody's we know, or the file is damaged.
    """
    if path.suffix == ".jsonl" and path.is_file():
        return _lines(path)
    if path.suffix == ".tar" and path.is_file():
        return _tar(path)
    pairs = [(folder, folder.with_name(folder.name[:-6] + "_labels")) for folder in sorted(path.glob("*_codes"))]
    if pairs and pairs[0][1].is_dir():
        return _pair(*pairs[0])
    if path.is_dir() and any(child.name.isdigit() and any(child.glob("*.npy")) for child in path.iterdir()):
        return _classes(path)
    raise ValueError(
        f"--codes {path}: neither a LlamaGen code folder (with NAME_codes and NAME_labels in it), nor a RandAR tar or "
        "its folder of classes, nor a 1d-tokenizer .jsonl file"
    )


def _pair(codes: Path, labels: Path) -> Codes:
    """`{i}.npy` int64 (1, A, N) and its label (1,) in another folder (LlamaGen, train/extract_codes_c2i.py)."""
    files = sorted(codes.glob("*.npy"), key=lambda file: (len(file.stem), file.stem))
    keys = unique_keys(file.stem for file in files)

    def read(i: int) -> tuple[str, NDArray[Any], int]:
        label = _load(labels / files[i].name)
        if label.size != 1:
            raise ValueError(f"{labels / files[i].name} holds {label.size} labels, not one")
        return keys[i], _views(_load(files[i])), int(label.item())

    return Codes("LlamaGen code folder", len(files), read)


def _classes(path: Path) -> Codes:
    """`{class}/{i}.npy`, int64 (A, N) (RandAR, tools/extract_latent_codes.py)."""
    files = sorted(file for file in path.glob("*/*.npy") if file.parent.name.isdigit())
    keys = unique_keys(f"{file.parent.name}_{file.stem}" for file in files)

    def read(i: int) -> tuple[str, NDArray[Any], int]:
        return keys[i], _views(_load(files[i])), int(files[i].parent.name)

    return Codes("RandAR folder", len(files), read)


def _tar(path: Path) -> Codes:
    """The same folder in a tar file."""
    try:
        archive = tarfile.open(regular(path))  # noqa: SIM115 it stays open for the reader
        members = [
            m for m in archive if m.isfile() and m.name.endswith(".npy") and not Path(m.name).name.startswith(".")
        ]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or download it again") from error
    if strange := [member.name for member in members if not Path(member.name).parent.name.isdigit()]:
        raise ValueError(f"{path}: {strange[0]} lies in no folder named by a class number")

    places = [Path(member.name) for member in members]
    keys = unique_keys(f"{place.parent.name}_{place.stem}" for place in places)

    def read(i: int) -> tuple[str, NDArray[Any], int]:
        place = places[i]
        data = archive.extractfile(members[i])
        assert data is not None  # it is a file
        codes = _load(io.BytesIO(data.read()), name=f"{path}, {place}")
        return keys[i], _views(codes), int(place.parent.name)

    return Codes("RandAR tar", len(members), read)


def _lines(path: Path) -> Codes:
    """`{"class_id": ..., "tokens": [...]}` a line; every view of an image is a line of its own."""
    starts, at = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                starts.append(at)
            at += len(line)

    def read(i: int) -> tuple[str, NDArray[Any], int]:
        with open(path, "rb") as file:
            file.seek(starts[i])
            row = json.loads(file.readline())
        return f"line{i:09d}", _views(np.asarray(row["tokens"])), int(row["class_id"])

    return Codes("1d-tokenizer lines", len(starts), read)


def _foreign_codebook(found: Codes, codes: int) -> bool:
    """Whether a thousand samples have no code above 1,023, as MaskGIT-VQGAN's (which RAR's lines hold) must be."""
    some = range(0, found.images, max(1, found.images // 1000))
    return codes > 1024 and max((int(found.read(i)[1].max()) for i in some), default=0) < 1024


def _load(file: Any, *, name: Any = None) -> NDArray[Any]:
    try:
        return np.load(regular(file) if isinstance(file, Path) else file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{name or file} is not a readable .npy file ({error}). Copy it again") from error


def _views(codes: NDArray[Any]) -> NDArray[Any]:
    """(..., A, N) or (N,) as (A, N)."""
    return codes.reshape(-1, codes.shape[-1]) if codes.ndim else codes.reshape(1, 1)
