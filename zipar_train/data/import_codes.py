"""Import of codes from other projects: LlamaGen's folders, RandAR's tar, 1d-tokenizer's (RAR's) JSON lines."""

import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zipar_train.data.keys import unique_keys
from zipar_train.data.labels import listed, number
from zipar_train.data.manifest import Layout, Manifest
from zipar_train.data.sample import Sample
from zipar_train.data.shards import write_shards
from zipar_train.io.errors import printable, truncate
from zipar_train.io.files import folder_lock, open_regular, regular
from zipar_train.io.untrusted_tar import array, entries
from zipar_train.recipe.schema import Recipe


class Codes(NamedTuple):
    """A reader for codes of a recognised format."""

    kind: str  # name of the format
    images: int
    read: Callable[[int], tuple[str, NDArray[Any], Any]]  # key, codes (..., A, N), label; may raise any exception
    where: Callable[[int], str]  # the file of an image's codes

    def sample(self, i: int) -> tuple[str, NDArray[Any], int]:
        """Return the key, the codes (A, N) and the class of an image.

        Raises:
            ValueError: If codes or label cannot be read; names the file.
        """
        try:
            key, codes, label = self.read(i)
            if not codes.size:
                raise ValueError(f"no codes in an array of shape {codes.shape}")
            rows = codes.reshape(-1, codes.shape[-1]) if codes.ndim else codes.reshape(1, 1)
            return key, rows, number(label)
        except Exception as error:  # parsing untrusted bytes can raise almost any exception
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            message = f"{kind}{_line(error)}"
            message = message if self.where(i) in message else f"{self.where(i)} is damaged ({message})"
            raise ValueError(f"{message}. Copy or download it again") from error


def import_codes(
    recipe: Recipe,
    *,
    codes: str | Path,
    out: str | Path,
    split: str = "train",
    progress: Callable[..., Any] | None = None,
) -> Manifest:
    """Convert codes of another project to `out`/`split`.json and its shards.

    Args:
        codes: A LlamaGen code folder (which contains `imagenet384_codes` and `imagenet384_labels`), a RandAR tar or the
            folder it unpacks to, or a 1d-tokenizer `.jsonl`.
        progress: Wraps the array of image numbers to read, for example in a progress bar.

    Raises:
        ValueError: If the format is unknown, a file is damaged, or the codes do not fit the recipe's grid and codebook.
    """
    model = recipe.model
    height, width = model.grid
    if model.num_classes is None:
        raise ValueError(f"recipe {recipe.name} is prompted by captions, and imported codes have classes")
    found, manifest = recognise(Path(codes)), Path(out) / f"{split}.json"
    if not found.images:
        raise ValueError(f"{codes} holds no codes: copy or download it again")
    layout = Layout(
        source=f"{found.kind}: {printable(Path(codes).name)}",
        grid=(height, width),
        codes=model.codebook_size,
        classes=model.num_classes,
        views="as imported",
    )

    def samples() -> Iterator[Sample]:
        order: Any = np.random.default_rng(0).permutation(found.images)  # the original order is by class
        for i in progress(order) if progress else order:
            key, rows, label = found.sample(int(i))
            if rows.shape[-1] != height * width:
                raise ValueError(
                    f"{codes}, {key}: {rows.shape[-1]} codes an image, but the recipe's grid of {height}x{width} has "
                    f"{height * width}. Use the recipe these codes are for, or set model.grid"
                )
            yield Sample(key, rows.reshape(-1, height, width), label)

    if _foreign_codebook(found, model.codebook_size):
        raise ValueError(
            f"{codes}: all codes are below 1,024, as those of MaskGIT-VQGAN are, and the recipe's codebook has "
            f"{model.codebook_size}. Import them for a model of that tokenizer, with model.codebook_size=1024"
        )
    work = manifest.parent / f".{split}"  # the folder that `tokenize` locks too
    try:
        with folder_lock(work):
            if manifest.exists():
                raise ValueError(f"{manifest} already exists: give another --out or --split, or remove it")
            return write_shards(samples(), manifest, layout=layout)
    finally:
        with suppress(OSError):  # it is not empty if a `tokenize` is unfinished
            work.rmdir()


def recognise(path: Path) -> Codes:
    """Detect the format of codes and return a reader.

    Raises:
        ValueError: If the format is unknown, or the file is damaged.
    """
    if path.suffix == ".jsonl" and path.is_file():
        return _lines(path)
    if path.suffix == ".tar" and path.is_file():
        return _tar(path)
    pairs = [(folder, folder.with_name(folder.name[:-6] + "_labels")) for folder in sorted(path.glob("*_codes"))]
    if pairs and pairs[0][1].is_dir():
        return _pair(*pairs[0])
    if path.is_dir() and any(child.name.isdecimal() and any(child.glob("*.npy")) for child in path.iterdir()):
        return _classes(path)
    raise ValueError(
        f"--codes {path}: neither a LlamaGen code folder (with NAME_codes and NAME_labels in it), nor a RandAR tar or "
        "its folder of classes, nor a 1d-tokenizer .jsonl file"
    )


def _pair(codes: Path, labels: Path) -> Codes:
    """Read `{i}.npy`, int64 (1, A, N), and its label (1,) in another folder (LlamaGen, train/extract_codes_c2i.py)."""
    files = sorted(_arrays(codes, "*.npy"), key=lambda file: (len(file.stem), file.stem))
    keys = unique_keys(file.stem for file in files)

    def read(i: int) -> tuple[str, NDArray[Any], Any]:
        label = _load(labels / files[i].name)
        if label.size != 1:
            raise ValueError(f"{labels / files[i].name} holds {label.size} labels, not one")
        return keys[i], _load(files[i]), label.item()

    return Codes("LlamaGen code folder", len(files), read, lambda i: str(files[i]))


def _classes(path: Path) -> Codes:
    """Read `{class}/{i}.npy`, int64 (A, N) (RandAR, tools/extract_latent_codes.py)."""
    files = sorted(file for file in _arrays(path, "*/*.npy") if file.parent.name.isdecimal())
    keys = unique_keys(f"{file.parent.name}_{file.stem}" for file in files)
    if strange := sorted({file.parent.name for file in _arrays(path, "*/*.npy")} - {f.parent.name for f in files}):
        print(f"{path}: left out, as no class number names them: folders {listed(strange)}", file=sys.stderr)

    def read(i: int) -> tuple[str, NDArray[Any], Any]:
        return keys[i], _load(files[i]), files[i].parent.name

    return Codes("RandAR folder", len(files), read, lambda i: str(files[i]))


def _tar(path: Path) -> Codes:
    """Read a tar file of `{class}/{i}.npy`, int64 (A, N), as in `_classes`."""
    notes: list[str] = []
    try:
        archive = tarfile.open(regular(path))  # noqa: SIM115 it stays open for the reader
        members = [
            m
            for m in entries(archive, notes)
            if m.isfile() and m.name.endswith(".npy") and not Path(m.name).name.startswith(".")
        ]
    except Exception as error:  # from the archive or its compression
        raise ValueError(f"{path} is damaged ({_line(error)}). Copy or download it again") from error
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr)
    if strange := [member.name for member in members if not Path(member.name).parent.name.isdecimal()]:
        raise ValueError(f"{path}: {strange[0]} lies in no folder named by a class number")

    places = [Path(member.name) for member in members]
    keys = unique_keys(f"{place.parent.name}_{place.stem}" for place in places)

    def read(i: int) -> tuple[str, NDArray[Any], Any]:
        data = archive.extractfile(members[i])
        assert data is not None
        return keys[i], array(data.read()), places[i].parent.name

    return Codes("RandAR tar", len(members), read, lambda i: f"{path}, {places[i]}")


def _lines(path: Path) -> Codes:
    """Read lines of `{"class_id": ..., "tokens": [...]}`, one line per view of an image."""
    starts, numbers, at = [], [], 0
    with open_regular(path) as file:
        for count, line in enumerate(file, 1):
            if line.strip():
                starts.append(at)
                numbers.append(count)
            at += len(line)

    def read(i: int) -> tuple[str, NDArray[Any], Any]:
        with open_regular(path) as file:
            file.seek(starts[i])
            row = json.loads(file.readline())
        return f"line{i:09d}", np.asarray(row["tokens"]), row["class_id"]

    return Codes("1d-tokenizer lines", len(starts), read, lambda i: f"{path}, line {numbers[i]},")


def _foreign_codebook(found: Codes, codes: int) -> bool:
    """Return True if 1,000 samples have no code above 1,023, as with MaskGIT-VQGAN, the tokenizer of RAR's codes."""
    some = range(0, found.images, max(1, found.images // 1000))
    return codes > 1024 and max((int(found.sample(i)[1].max()) for i in some), default=0) < 1024


def _line(error: Exception) -> str:
    return truncate(" ".join(str(error).split()), length=300)


def _arrays(path: Path, pattern: str) -> list[Path]:
    """Return the files that match a pattern, without hidden ones."""
    return [file for file in path.glob(pattern) if not any(p.startswith(".") for p in file.relative_to(path).parts)]


def _load(file: Path) -> NDArray[Any]:
    try:
        with open_regular(file) as opened:
            return array(opened.read())
    except Exception as error:  # parsing untrusted bytes can raise almost any exception
        raise ValueError(f"{file} is not a readable .npy file ({_line(error)})") from error
