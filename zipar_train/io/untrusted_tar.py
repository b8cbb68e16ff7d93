"""Samples from the bytes of an untrusted tar file: nothing is unpacked to disk or executed."""

import io
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from zipar_train.io.errors import truncate

LONGEST = 1000  # most characters in a file name


def grouped(data: bytes, path: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar file, each as a dictionary of its files.

    Raises:
        ValueError: If this is not a tar file, contains anything but folders and files, or contains a file twice.
    """
    from webdataset.tariterators import group_by_keys

    try:
        yield from group_by_keys(_files(data, path))
    except Exception as error:  # parsing untrusted bytes can raise almost any exception
        reason = truncate(error.args[0] if error.args else error, length=300)
        raise ValueError(f"{path} is not a readable tar file ({reason}). Copy or make it again") from error


def entries(archive: tarfile.TarFile, notes: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file, and check that it ends after the last one.

    `tarfile` itself stops silently at the first damaged header.

    Args:
        notes: Receives a note if the tar has no end-of-archive marker. Some programs omit the marker; a tar that was
            truncated exactly between two files lacks it too.

    Raises:
        tarfile.ReadError: If data follow the last file or the end-of-archive marker.
    """
    yield from archive
    file, end = archive.fileobj, archive.offset  # type: ignore[attr-defined]  # where the next header was expected
    assert file is not None
    file.seek(end)
    marked = False
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"byte {end:,} begins no file, and data follow: it is damaged there, or two archives are joined"
            )
        marked = True
    if not marked:
        notes.append("it has no end-of-archive mark. If it was cut short, files are missing")


def _files(data: bytes, path: str) -> Iterator[dict[str, Any]]:
    """Yield the regular files of a tar in webdataset's format; links, devices and sparse files are errors."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in entries(tar, []):  # manifests count the samples
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
    """Return the array of a .npy file; it takes no more memory than the file, whatever the header declares.

    Raises:
        Exception: Of many kinds, if the data are not a valid .npy file.
    """
    file = io.BytesIO(data)
    headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if (read := headers.get(npy.read_magic(file))) is None:
        raise ValueError("not a plain .npy file")
    shape, by_columns, dtype = read(file)
    if dtype.kind not in "uif" or any(side < 0 for side in shape):
        raise ValueError(f"an array of shape {shape} and type {dtype}")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if by_columns else "C").astype(dtype.newbyteorder("="))
