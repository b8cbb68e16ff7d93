"""Codes that other projects made, to shards: LlamaGen's folders, RandAR's tar, 1d-tokenizer's (RAR's) lines of JSON."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zipar_train.sections import Recipe
from zipar_train.shards import Layout, Manifest, Sample, write_shards


class Codes(NamedTuple):
    """Somebody's codes, recognised."""

    kind: str  # whose, in words
    samples: Callable[[], Iterator[tuple[str, NDArray[Any], int]]]  # key, codes (A, N), class
    images: int | None  # if that is known beforehand


def import_codes(
    recipe: Recipe, *, codes: str | Path, out: str | Path, split: str = "train", progress: Callable[..., Any] = iter
) -> Manifest:
    """Write codes that others made as `out`/`split`.json and its shards.

    Args:
        codes: a LlamaGen code folder (with `imagenet384_codes` and `imagenet384_labels` in it), a RandAR tar or the
            folder it unpacks to, or a 1d-tokenizer `.jsonl`.
        progress: wraps the iterator of samples; called with `total=`.

    Raises:
        ValueError: for an unknown format, a damaged file, or codes that do not fit the recipe's grid and codebook.
    """
    model = recipe.model
    height, width = model.grid
    if model.classes is None:
        raise ValueError(f"recipe {recipe.name} is prompted by captions, and imported codes have classes")
    found = recognise(Path(codes))
    layout = Layout(
        source=f"{found.kind}: {Path(codes).name}", grid=(height, width), codes=model.codes, classes=model.classes,
        views="as imported",
    )  # fmt: skip

    def samples() -> Iterator[Sample]:
        stream = found.samples()
        for key, rows, label in progress(stream, total=found.images) if progress is not iter else stream:
            if rows.shape[-1] != height * width:
                raise ValueError(
                    f"{codes}, {key}: {rows.shape[-1]} codes an image, but the recipe's grid of {height}x{width} has "
                    f"{height * width}. Use the recipe these codes are for, or set model.grid"
                )
            yield Sample(key, rows.reshape(-1, height, width), label)

    try:
        return write_shards(samples(), Path(out) / f"{split}.json", layout=layout)
    except (json.JSONDecodeError, tarfile.TarError, EOFError, KeyError) as error:
        raise ValueError(f"{codes} is damaged ({type(error).__name__}: {error}). Copy or download it again") from error


def recognise(path: Path) -> Codes:
    """Whose codes these are.

    Raises:
        ValueError: if nobody's we know.
    """
    if path.suffix == ".jsonl" and path.is_file():
        return Codes("1d-tokenizer lines", lambda: _lines(path), None)
    if path.suffix == ".tar" and path.is_file():
        return Codes("RandAR tar", lambda: _tar(path), None)
    pairs = [(folder, folder.with_name(folder.name[:-6] + "_labels")) for folder in sorted(path.glob("*_codes"))]
    if pairs and pairs[0][1].is_dir():
        return Codes("LlamaGen code folder", lambda: _pair(*pairs[0]), sum(1 for _ in pairs[0][0].glob("*.npy")))
    if path.is_dir() and any(child.name.isdigit() and any(child.glob("*.npy")) for child in path.iterdir()):
        files = sorted(path.glob("*/*.npy"), key=lambda file: (int(file.parent.name), file.stem))
        return Codes("RandAR folder", lambda: _classes(files), len(files))
    raise ValueError(
        f"--codes {path}: neither a LlamaGen code folder (with NAME_codes and NAME_labels in it), nor a RandAR tar or "
        "its folder of classes, nor a 1d-tokenizer .jsonl file"
    )


def _pair(codes: Path, labels: Path) -> Iterator[tuple[str, NDArray[Any], int]]:
    """`{i}.npy` int64 (1, A, N) and its label (1,) in another folder (LlamaGen, train/extract_codes_c2i.py)."""
    for file in sorted(codes.glob("*.npy"), key=lambda file: (len(file.stem), file.stem)):
        label = _load(labels / file.name)
        if label.size != 1:
            raise ValueError(f"{labels / file.name} holds {label.size} labels, not one")
        yield file.stem, _views(_load(file)), int(label.item())


def _classes(files: list[Path]) -> Iterator[tuple[str, NDArray[Any], int]]:
    """`{class}/{i}.npy`, int64 (A, N) (RandAR, tools/extract_latent_codes.py)."""
    for file in files:
        yield f"{file.parent.name}_{file.stem}", _views(_load(file)), int(file.parent.name)


def _tar(path: Path) -> Iterator[tuple[str, NDArray[Any], int]]:
    with tarfile.open(path) as archive:
        for member in archive:
            place = Path(member.name)
            if not member.isfile() or place.suffix != ".npy" or place.name.startswith("."):
                continue
            if not place.parent.name.isdigit():
                raise ValueError(f"{path}: {member.name} lies in no folder named by a class number")
            data = archive.extractfile(member)
            assert data is not None  # it is a file
            codes = _load(io.BytesIO(data.read()), name=f"{path}, {member.name}")
            yield f"{place.parent.name}_{place.stem}", _views(codes), int(place.parent.name)


def _lines(path: Path) -> Iterator[tuple[str, NDArray[Any], int]]:
    """`{"class_id": ..., "tokens": [...]}` a line; every view of an image is a line of its own."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if line.strip():
                row = json.loads(line)
                yield f"line{number:09d}", _views(np.asarray(row["tokens"])), int(row["class_id"])


def _load(file: Any, *, name: Any = None) -> NDArray[Any]:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{name or file} is not a readable .npy file ({error}). Copy it again") from error


def _views(codes: NDArray[Any]) -> NDArray[Any]:
    """(..., A, N) or (N,) as (A, N)."""
    return codes.reshape(-1, codes.shape[-1]) if codes.ndim else codes.reshape(1, 1)
