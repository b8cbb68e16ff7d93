"""The `.npz` files of ADM's evaluator (openai/guided-diffusion, evaluations/): reading references, writing images.

A file contains images, `arr_0` uint8 (N, height, width, 3). A reference also contains statistics over a whole dataset:
`mu` (2048,) and `sigma` (2048, 2048) of Inception's pooled features, `mu_s` (2023,) and `sigma_s` (2023, 2023) of its
spatial features. Only one block of images is in memory at a time.
"""

import os
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from zipar_train.io.files import open_regular, sha256_of

Statistics = dict[str, NDArray[np.floating[Any]]]  # mu, sigma
SHAPES = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)
REMEDY = "Give ADM's VIRTUAL_imagenet256_labeled.npz, a folder of pictures, or the .json of a shard set"


@dataclass(frozen=True)
class Reference:
    """Checked reference file of ADM's format.

    Attributes:
        images: Number of images; 0: only statistics.
        size: Height and width in pixels; None without images.
        pooled, spatial: {"mu", "sigma"} in float64; None if the file has none.
    """

    path: Path
    sha256: str  # checksum of the file
    archive: zipfile.ZipFile  # kept open, in case the file is replaced meanwhile
    images: int
    size: tuple[int, int] | None
    pooled: Statistics | None
    spatial: Statistics | None

    def blocks(self, count: int) -> Iterator[Tensor]:
        """Yield the images in order, in blocks uint8 (count or fewer, 3, height, width)."""
        with self.archive.open("arr_0.npy") as file:
            shape, _ = _header(file, self.path)
            one = int(np.prod(shape[1:]))
            for start in range(0, shape[0], count):
                wanted = min(count, shape[0] - start)
                try:
                    data = file.read(wanted * one)
                except UNREADABLE as error:
                    raise ValueError(f"{self.path} is damaged: arr_0 is unreadable ({error}). Fetch it again") from None
                if len(data) != wanted * one:
                    raise ValueError(f"{self.path} is damaged: arr_0 ends after image {start}. Fetch it again")
                pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                yield pixels.view(wanted, *shape[1:]).permute(0, 3, 1, 2).contiguous()


def read_reference(path: Path) -> Reference:
    """Open and check a file of ADM's format.

    Raises:
        ValueError: If the file, a key, a shape or a dtype does not fit the format; names it and the remedy.
    """
    with ExitStack() as stack:
        try:
            held = stack.enter_context(open_regular(path))
            archive = stack.enter_context(zipfile.ZipFile(held))
            shape, numbers = _checked(archive, path)
        except UNREADABLE as error:
            raise ValueError(f"{path} is not a readable .npz file ({error}). {REMEDY}") from None
        reference = Reference(
            path=path,
            sha256=sha256_of(held),
            archive=archive,
            images=shape[0] if shape else 0,
            size=(shape[1], shape[2]) if shape else None,
            pooled={"mu": numbers["mu"], "sigma": numbers["sigma"]} if "mu" in numbers else None,
            spatial={"mu": numbers["mu_s"], "sigma": numbers["sigma_s"]} if "mu_s" in numbers else None,
        )
        stack.pop_all()  # stays open as long as the reference
    return reference


def _checked(archive: zipfile.ZipFile, path: Path) -> tuple[tuple[int, ...] | None, dict[str, NDArray[np.float64]]]:
    """Return the shape of the images, or None without images, and the statistics."""
    members = archive.namelist()
    names = {name.removesuffix(".npy") for name in members}
    if unknown := names - SHAPES.keys() - {"arr_0"}:
        raise ValueError(f"{path} holds {sorted(unknown)[0]!r}, which is not of ADM's format. {REMEDY}")
    if strange := [name for name in members if members.count(name) > 1 or not name.endswith(".npy")]:
        raise ValueError(f"{path}: {strange[0]} is there twice, or is not an array of numpy. {REMEDY}")
    for a, b in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (a in names) != (b in names):
            raise ValueError(f"{path} holds one of {a} and {b} without the other. {REMEDY}")
    if not names & {"arr_0", "mu"}:
        raise ValueError(f"{path} holds neither arr_0 nor mu. {REMEDY}")
    shape = None
    if "arr_0" in names:
        with archive.open("arr_0.npy") as file:
            shape, dtype = _header(file, path)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise ValueError(f"{path}: arr_0 is {dtype} {shape}, not uint8 (N, height, width, 3). {REMEDY}")
    return shape, {name: _numbers(archive, name, path) for name in names - {"arr_0"}}


def write_images(path: Path, images: Iterable[Tensor], *, count: int, size: tuple[int, int]) -> None:
    """Write images as `arr_0` block by block; the file appears complete or not at all.

    Args:
        path: The file.
        images: Blocks, uint8 (B, 3, height, width), `count` images in total.
        count: Number of images.
        size: Height and width in pixels.

    Raises:
        OSError: If the file cannot be written; names it, and nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                bar = tqdm(images, desc=path.name, unit="batch", leave=False, disable=None)
                written = sum(file.write(_bytes(block, size)) for block in bar)
            assert written == count * size[0] * size[1] * 3
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            aside.unlink()


def _bytes(block: Tensor, size: tuple[int, int]) -> bytes:
    assert block.dtype == torch.uint8 and block.shape[1:] == (3, *size)
    return block.permute(0, 2, 3, 1).contiguous().numpy().tobytes()


def _header(file: IO[bytes], path: Path, name: str = "arr_0") -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # numpy's parser of damaged headers
        raise ValueError(f"{path} is damaged: {name} has no header ({error}). Fetch it again") from None
    if fortran and len(shape) > 2:  # a covariance is symmetric
        raise ValueError(f"{path}: {name} lies column by column. {REMEDY}")
    return shape, dtype


def _numbers(archive: zipfile.ZipFile, name: str, path: Path) -> NDArray[np.float64]:
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _header(file, path, name)  # check the shape before allocating memory for it
    if shape != SHAPES[name] or dtype not in (np.float32, np.float64):
        raise ValueError(f"{path}: {name} is {dtype} {shape}, not floats {SHAPES[name]}. {REMEDY}")
    with archive.open(f"{name}.npy") as file:
        try:
            numbers = npy.read_array(file, allow_pickle=False)
        except Exception as error:  # numpy's and zlib's parsers of damaged data
            raise ValueError(f"{path}: {name} cannot be read ({error}). {REMEDY}") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{path}: {name} holds numbers that are not finite. {REMEDY}")
    if numbers.ndim == 2 and not (np.allclose(numbers, numbers.T, atol=1e-6) and (numbers.diagonal() >= -1e-6).all()):
        raise ValueError(
            f"{path}: {name} is not a covariance: it is not symmetric, or a variance is negative. {REMEDY}"
        )
    return numbers.astype(np.float64)
