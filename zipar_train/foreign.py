"""Samples from the bytes of a tar file that nobody vouches for: nothing is believed, unpacked or run."""

import io
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from zipar_train.wording import cut

LONGEST = 1000  # characters of a file's name


def grouped(data: bytes, path: str) -> Iterator[dict[str, Any]]:
    """The files of a tar, those of each sample together.

    Raises:
        ValueError: if it is no tar, or holds anything but folders and files, or a file twice.
    """
    from webdataset.tariterators import group_by_keys

    try:
        yield from group_by_keys(_files(data, path))
    except Exception as error:  # a parser of foreign bytes fails in a dozen ways
        reason = cut(error.args[0] if error.args else error, length=300)
        raise ValueError(f"{path} is not a readable tar file ({reason}). Copy or make it again") from error


def _files(data: bytes, path: str) -> Iterator[dict[str, Any]]:
    """The files of a tar for webdataset: none is unpacked, followed, or larger than it lies there."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if member.size < 0 or len(member.name) > LONGEST:
                raise tarfile.ReadError(f"a file of {member.size} bytes, a name of {len(member.name)} characters")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise tarfile.ReadError(f"{member.name} is a link, a device or a sparse file")
            content = tar.extractfile(member)
            assert content is not None
            yield {"fname": member.name, "data": content.read(), "__url__": path}


def array(data: bytes) -> NDArray:
    """A .npy file's array, which takes no more memory than the file, whatever its header says.

    Raises:
        Exception: of a dozen kinds, if it is none.
    """
    file = io.BytesIO(data)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("not a plain .npy file")
    shape, by_columns, dtype = npy.read_array_header_1_0(file)
    if dtype.kind not in "uif" or any(side < 0 for side in shape):
        raise ValueError(f"an array of shape {shape} and type {dtype}")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if by_columns else "C").astype(dtype.newbyteorder("="))
