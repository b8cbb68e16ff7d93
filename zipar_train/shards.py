"""Shards of codes, written whole or not at all, read with nothing in them trusted.

A shard set is a manifest, `train.json` say, beside its tar files. A sample is `{key}.codes.npy`, uint16 (A, H, W) with
A views of one image, and `{key}.cls`, its class in decimal: plain webdataset. The manifest holds the grid, the
codebook's size, the number of classes, and every shard's count and checksum.
"""

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zipar_train.files import make_folder, write_whole
from zipar_train.grid import Grid


class Sample(NamedTuple):
    key: str
    codes: NDArray[np.uint16]  # (A, H, W)
    label: int


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    samples: int = Field(ge=1, lt=2**31)
    sha256: str


class Manifest(BaseModel):
    """What is in a shard set. `grid` is rows and columns of codes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    grid: tuple[int, int]
    codes: int
    classes: int
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_shards(
    samples: Iterable[Sample],
    manifest: str | Path,
    *,
    grid: tuple[int, int],
    codes: int,
    classes: int,
    source: str,
    per_shard: int = 5000,
) -> Manifest:
    """Write samples as shards beside a manifest: in a folder aside, moved when all are there, the manifest last.

    Args:
        manifest: the file to write, `data/digits/train.json`; shards become `data/digits/train-000000.tar` and so on.
        source: what the images were, in words.
        per_shard: samples a shard.

    Raises:
        ValueError: for a sample off the grid, the codebook or the classes, or no sample at all.
        OSError: if a file cannot be written.
    """
    manifest = Path(manifest)
    make_folder(manifest.parent)
    stream = iter(samples)
    shards: list[Shard] = []
    aside = manifest.parent / f".{manifest.stem}.{os.getpid()}"
    try:
        make_folder(aside)
        while chunk := list(islice(stream, per_shard)):
            for sample in chunk:
                _check(sample, grid, codes, classes, where=f"sample {sample.key}")
            data, name = _tar(chunk), f"{manifest.stem}-{len(shards):06d}.tar"
            write_whole(aside / name, data)
            shards.append(Shard(name=name, samples=len(chunk), sha256=hashlib.sha256(data).hexdigest()))
        if not shards:
            raise ValueError(f"{manifest}: no samples to write")
        for shard in shards:
            os.replace(aside / shard.name, manifest.parent / shard.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    written = Manifest(source=source, grid=grid, codes=codes, classes=classes, shards=tuple(shards))
    write_whole(manifest, (written.model_dump_json(indent=1) + "\n").encode())
    return written


def _tar(chunk: list[Sample]) -> bytes:
    import webdataset as wds

    buffer = io.BytesIO()
    with wds.TarWriter(buffer, encoder=False, mtime=0) as tar:
        for sample in chunk:
            npy = io.BytesIO()
            np.save(npy, sample.codes.astype(np.uint16), allow_pickle=False)
            tar.write({"__key__": sample.key, "codes.npy": npy.getvalue(), "cls": str(sample.label).encode()})
    return buffer.getvalue()


def _check(sample: Sample, grid: tuple[int, int], codes: int, classes: int, *, where: str) -> None:
    if sample.codes.ndim != 3 or not len(sample.codes) or sample.codes.shape[1:] != tuple(grid):
        raise ValueError(f"{where}: codes of shape {sample.codes.shape}, not (views, {grid[0]}, {grid[1]})")
    if not np.issubdtype(sample.codes.dtype, np.integer):
        raise ValueError(f"{where}: codes of type {sample.codes.dtype}, not integers")
    outside = sample.codes[(sample.codes < 0) | (sample.codes >= codes)]
    if outside.size:
        raise ValueError(f"{where}: code {outside[0]} is outside a codebook of {codes} codes (0 .. {codes - 1})")
    if not 0 <= sample.label < classes:
        raise ValueError(f"{where}: class {sample.label} is outside 0 .. {classes - 1}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_manifest(
    path: str | Path, *, grid: Grid | None = None, codes: int | None = None, classes: int | None = None
) -> Manifest:
    """The manifest of a shard set, checked against what the model expects, its shards' presence included.

    Raises:
        ValueError: naming the file, what is wrong, and the remedy.
    """
    path = Path(path)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"no shards at {path}: make them with `zipar-train tokenize`, "
            "or set data.train and data.val to the manifests (.json) you have"
        ) from None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a manifest of shards: {error}") from error
    if not manifest.samples:
        raise ValueError(f"{path} lists no samples: make the shards again with `zipar-train tokenize`")
    for what, has, wants in (
        ("grid", "x".join(map(str, manifest.grid)), f"{grid.height}x{grid.width}" if grid else None),
        ("codebook of", manifest.codes, codes),
        ("number of classes", manifest.classes, classes),
    ):
        if wants is not None and has != wants:
            raise ValueError(
                f"{path}: {what} {has}, but the recipe's model has {wants}. "
                "Use shards made by `zipar-train tokenize` with this recipe, or mend the recipe's model section"
            )
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name:
            raise ValueError(f"{path} names the shard {shard.name!r}: shards lie beside their manifest")
        if not (path.parent / shard.name).is_file():
            raise ValueError(
                f"{path.parent / shard.name} is missing, though {path.name} lists it: copy or make it again"
            )
    return manifest


def read_shard(path: Path, shard: Shard, manifest: Manifest) -> Iterator[Sample]:
    """The samples of one shard, in their order on disk.

    Raises:
        ValueError: if the file is not the one the manifest lists, or a sample is not what it should be; names both.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Copy or make it again") from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ValueError(f"{path} is damaged: its checksum is not the manifest's. Copy or make it again")
    found = 0
    try:
        for raw in group_by_keys(tar_file_expander([{"url": str(path), "stream": io.BytesIO(data)}])):
            where = f"{path}, sample {raw['__key__']}"
            try:
                codes = np.load(io.BytesIO(raw["codes.npy"]), allow_pickle=False)
                sample = Sample(raw["__key__"], codes, int(raw["cls"]))
            except (KeyError, ValueError, EOFError) as error:
                raise ValueError(f"{where}: not readable ({error}). Make the shard again") from error
            _check(sample, manifest.grid, manifest.codes, manifest.classes, where=where)
            found += 1
            yield sample
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar file ({error}). Copy or make it again") from error
    if found != shard.samples:
        raise ValueError(f"{path} holds {found} samples, but its manifest lists {shard.samples}. Make it again")
