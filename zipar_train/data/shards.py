"""Shards of codes, written atomically and read as untrusted input.

A shard set is a manifest such as `train.json` and tar files in the same folder, in webdataset format. A sample is
`{key}.codes.npy`, uint16 (A, H, W) with A views of one image, and its condition: `{key}.cls`, a class in decimal, or
`{key}.txt`, a caption in UTF-8, optionally with `{key}.features.npy`, float16 (n, F). Where the grid has a preview, a
sample also has `{key}.preview.npy`, uint16 (A, H', W'). All samples of a shard have the same grid. The manifest stores
the grids, the codebook size, the number of classes and their names, the tokenizer's checksum, and each shard's count
and checksum.

A manifest may be behind any URL that fsspec supports (https, s3, gs, hf), with its shards in the same folder.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from zipar_train.data.labels import differ
from zipar_train.data.manifest import Layout, Manifest, Shard
from zipar_train.data.sample import Sample, check_sample
from zipar_train.io import remote
from zipar_train.io.errors import safe_repr, truncate
from zipar_train.io.files import make_folder, regular, write_atomic
from zipar_train.io.remote import conceal, is_url
from zipar_train.io.untrusted_tar import array, grouped
from zipar_train.plan.grid import Grid

Misfit = Callable[[str, Any], str]  # from a caption and its features or None to why they do not fit; "" if they do


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_shards(samples: Iterable[Sample], manifest: str | Path, *, layout: Layout, per_shard: int = 2000) -> Manifest:
    """Write samples as shards and a manifest: to a temporary folder, moved when complete, the manifest last.

    Args:
        manifest: The file to write; `data/digits/train.json` gets shards `data/digits/train-000000.tar` and so on.
        per_shard: Samples per shard.

    Raises:
        ValueError: If a sample does not fit the grid, the codebook or the classes, or if there are no samples.
        OSError: If a file cannot be written.
    """
    manifest = Path(manifest)
    make_folder(manifest.parent)
    stream = iter(samples)
    shards: list[Shard] = []
    aside = manifest.parent / f".{manifest.stem}.{os.getpid()}"
    try:
        make_folder(aside)
        while chunk := list(islice(stream, per_shard)):
            shards.append(write_shard(chunk, aside / shard_name(manifest, len(shards)), layout))
        if not shards:
            raise ValueError(f"{manifest}: no samples to write")
        for shard in shards:
            os.replace(aside / shard.name, manifest.parent / shard.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return write_manifest(manifest, layout, shards)


def shard_name(manifest: Path, number: int, grid: int | None = None) -> str:
    """Return the name of a part's shard; `grid` is the number of its grid, if the part has a shard for each grid."""
    return f"{manifest.stem}-{number:06d}{'' if grid is None else f'-{grid}'}.tar"


def write_shard(samples: Iterable[Sample], path: Path, layout: Layout, *, grid: Grid | None = None) -> Shard:
    """Write one shard as a tar file, atomically.

    Args:
        grid: The grid of its samples. None: the layout's.

    Raises:
        ValueError: If a sample does not fit the layout.
        OSError: If the file cannot be written.
    """
    import webdataset as wds

    buffer, count = io.BytesIO(), 0
    with wds.TarWriter(buffer, encoder=False, mtime=0) as tar:
        for sample in samples:
            check_sample(sample, layout, grid or layout.grid_of(), where=f"sample {sample.key}")
            member = {"__key__": sample.key, "codes.npy": _npy(sample.codes.astype(np.uint16))}
            if sample.preview is not None:
                member["preview.npy"] = _npy(sample.preview.astype(np.uint16))
            if sample.features is not None:
                member["features.npy"] = _npy(sample.features.astype(np.float16))
            tar.write(member | {"cls" if layout.classes else "txt": str(sample.condition).encode()})
            count += 1
    data = buffer.getvalue()
    write_atomic(path, data)
    sides = {} if grid is None else _sides(grid)
    return Shard(name=path.name, samples=count, sha256=hashlib.sha256(data).hexdigest(), **sides)


def write_manifest(path: Path, layout: Layout, shards: Iterable[Shard], *, skipped: int = 0) -> Manifest:
    manifest = Manifest(**layout.model_dump(), shards=tuple(shards), skipped=skipped)
    write_atomic(path, (manifest.model_dump_json(indent=1, exclude=manifest.unset) + "\n").encode())
    return manifest


def _npy(array: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _sides(grid: Grid) -> dict[str, Any]:
    """Return a grid as fields of a `Shard` or a `Layout`."""
    preview = grid.preview
    return {"grid": grid.sides, "preview": preview.sides if preview else None}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_manifest(
    path: str | Path,
    *,
    grids: Sequence[Grid] = (),
    codes: int | None = None,
    classes: int | None = None,
    captions: bool = False,
    sides: Sequence[int] | None = None,
) -> Manifest:
    """Read the manifest of a shard set, and check it against the model's requirements and the existing shards.

    Args:
        grids: Grids that the model supports; none: any.
        captions: The model requires captions, not classes.
        sides: Rows and columns of codes: return only the shards of this grid. None: all shards.

    Raises:
        ValueError: If the manifest is missing or does not fit, or no shard has this grid; names the file, the problem
            and the remedy.
    """
    path = conceal(str(path)) if is_url(path) else path
    try:
        manifest = Manifest.model_validate_json(_read(path))
    except FileNotFoundError:
        raise ValueError(
            f"no shards at {path}: make them with `zipar-train tokenize`, "
            "or set data.train and data.val to the manifests (.json) you have"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        said = f"{key} = {safe_repr(first['input'])}: {first['msg']}" if key else first["msg"]
        raise ValueError(f"{path} is not a manifest of shards: {truncate(said)}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not manifest.samples:
        raise ValueError(f"{path} lists no samples: make the shards again with `zipar-train tokenize`")
    known = {_named(grid) for grid in grids}
    other = [_named(grid) for grid, _ in manifest.split() if _named(grid) not in known]
    for what, has, wants in (
        ("grid", other[0] if known and other else "", " or ".join(map(_named, grids)) if known and other else None),
        ("codebook of", manifest.codes, codes),
        ("number of classes", manifest.classes or "none, but captions", "none, but captions" if captions else classes),
    ):
        if wants is not None and has != wants:
            raise ValueError(
                f"{path}: {what} {has}, but the recipe's model has {wants}. "
                "Use shards made by `zipar-train tokenize` with this recipe, or fix the recipe's model section"
            )
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name:
            raise ValueError(f"{path} names the shard {shard.name!r}: shards lie beside their manifest")
        if not is_url(path) and not Path(beside(path, shard.name)).is_file():
            raise ValueError(f"{beside(path, shard.name)} is missing, though {path} lists it: copy or make it again")
    if sides is None:
        return manifest
    chosen = tuple(shard for shard in manifest.shards if (shard.grid or manifest.grid) == tuple(sides))
    if not chosen:
        there = ", ".join(_named(grid) for grid, _ in manifest.split())
        raise ValueError(
            f"{path} has no images of {sides[0]}x{sides[1]} codes, only of {there}: use shards that have some, or set "
            "model.grid to one of these"
        )
    return manifest.model_copy(update={"shards": chosen})


def _named(grid: Grid) -> str:
    """Return the sides of a grid without row ends, and of its preview."""
    return f"{grid.height}x{grid.width}" + (f" after {_named(grid.preview)}" if grid.preview else "")


def same_classes(a: str | Path, b: str | Path, manifests: tuple[Manifest, Manifest]) -> None:
    """Check that classes have the same numbers in two shard sets, if both store class names.

    Raises:
        ValueError: If they differ; names both sets and the first class that differs.
    """
    if difference := differ(manifests[0].class_names, manifests[1].class_names):
        raise ValueError(
            f"{a} and {b} number their classes differently: {difference}. Tokenize both splits of one data set "
            "into the same --out, the one with all classes first"
        )


def read_shard(
    manifest: str | Path,
    shard: Shard,
    layout: Layout,
    *,
    bad: list[ValueError] | None = None,
    misfit: Misfit | None = None,
) -> Iterator[Sample]:
    """Yield the samples of one shard, in the order on disk.

    Args:
        manifest: Path or URL of the manifest; the shard is in the same folder.
        bad: Receives the errors of invalid samples, which are then skipped; None: they are raised.
        misfit: Returns why a caption, or its features, does not fit the model; empty if it does. None: no check.

    Raises:
        ValueError: If the checksum differs from the manifest's, or a sample is invalid; names the file and sample.
    """
    path = beside(manifest, shard.name)
    try:
        data = _read(path)
    except OSError as error:
        remedy = "Try again later" if is_url(path) else "Copy or make it again"
        raise ValueError(f"{path} cannot be read: {error.strerror or error}. {remedy}") from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ValueError(f"{path} is damaged: its checksum is not the manifest's. Copy or make it again")
    found, grid = 0, layout.grid_of(shard)
    for raw in grouped(data, path):
        found += 1
        try:
            sample = _sample(raw, layout, grid, where=f"{path}, sample {raw['__key__']}", misfit=misfit)
        except ValueError as error:
            if bad is None:
                raise
            bad.append(error)
        else:
            yield sample
    if found != shard.samples:
        raise ValueError(f"{path} holds {found} samples, but its manifest lists {shard.samples}. Make it again")


def _sample(raw: dict[str, Any], layout: Layout, grid: Grid, *, where: str, misfit: Misfit | None) -> Sample:
    try:
        codes = array(raw["codes.npy"])
        condition = int(raw["cls"]) if layout.classes else raw["txt"].decode()
        features = array(raw["features.npy"]) if "features.npy" in raw else None
        preview = array(raw["preview.npy"]) if "preview.npy" in raw else None
    except Exception as error:  # parsing untrusted bytes can raise almost any exception
        raise ValueError(f"{where}: not readable ({truncate(error, length=200)}). Make the shard again") from error
    sample = Sample(raw["__key__"], codes, condition, features, preview)
    check_sample(sample, layout, grid, where=where)
    if misfit is not None and isinstance(condition, str) and (reason := misfit(condition, features)):
        raise ValueError(f"{where}: {reason}")
    return sample


def beside(manifest: str | Path, name: str) -> str:
    """Return the path or URL of a file in the manifest's folder."""
    return remote.beside(conceal(str(manifest)), name) if is_url(manifest) else str(Path(manifest).parent / name)


def _read(path: str | Path) -> bytes:
    """Return the bytes of a file on disk or behind a URL.

    Raises:
        OSError: If the file cannot be read.
    """
    return remote.read(str(path)) if is_url(path) else regular(Path(path)).read_bytes()
