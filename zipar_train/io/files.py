"""Atomic file writes, folder locks, checks for regular files, and checksums."""

import hashlib
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

HANDED = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
FIGURES = ("", ".png", ".pdf", ".svg")  # extensions of figures; PNG if there is none
CLAIM = ".claimed"  # name of the lock file in a folder


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: to a temporary file in the same folder, which is then renamed.

    Raises:
        OSError: If the file cannot be written; names it. No temporary file is left behind.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # process ids repeat across containers
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink()
        if not isinstance(error, OSError):
            raise
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def folder_lock(folder: Path, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Lock a folder against other processes, on this machine or others; the lock ends with the process.

    Args:
        rank: Rank of this process among those that share the work.
        world: Number of those processes. Each locks the folder once, so that a second launch of the same work is
            refused.

    Raises:
        ValueError: If another process holds the lock; names that process.
        OSError: If the folder cannot be written.
    """
    while True:
        make_folder(folder)
        with open(folder / CLAIM, "a+") as file:
            try:
                _lock(file, rank, world)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(f"{folder}: {file.read().strip() or 'another process'} is at work in it") from None
            if not _still(folder / CLAIM, file):
                continue  # the previous holder has removed the lock file in the meantime
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                if world == 1:  # other ranks may still hold the lock
                    with suppress(OSError):
                        (folder / CLAIM).unlink()
            return


def _lock(file: IO[str], rank: int, world: int) -> None:
    """Lock bytes of a file without waiting: all bytes if `world` is 1, otherwise the byte of this rank and world size.

    Loader processes do not inherit these locks; they may outlive the process that holds the folder.

    Raises:
        BlockingIOError: If another process has the same rank, or another world size.
    """
    import fcntl  # not available on Windows

    def lock(how: int, start: int, length: int = 0) -> None:  # length 0: to the end of the file, however large it grows
        fcntl.lockf(file, how, length, start)

    now, most = fcntl.LOCK_EX | fcntl.LOCK_NB, 2**20
    lock(fcntl.LOCK_EX, 0, 1)  # held briefly: one process checks at a time
    if world == 1:
        lock(now, 1)
    else:
        ours = world * most
        others = (1, ours - 1), (ours + most, 0)
        for span in others:
            lock(now, *span)
        for span in others:
            lock(fcntl.LOCK_UN, *span)
        lock(now, ours + rank, 1)
    lock(fcntl.LOCK_UN, 0, 1)


def _still(path: Path, file: IO[str]) -> bool:
    """Return True if the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def regular(path: Path) -> Path:
    """Return the path unchanged if it leads to a regular file, which can be read without waiting for another program.

    A pipe that a shell passes, as in `--grid <(command)`, is also accepted, because the command closes it.

    Raises:
        OSError: If the path is missing, a folder, any other pipe, a socket or a device; names the file.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and str(path).startswith(HANDED)):
        return path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, not a file")
    kind = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
    raise OSError(f"{path} is a {kind}, not a file: reading it might never end")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading in binary mode.

    Raises:
        OSError: As in `regular`, or if the file cannot be read.
    """
    return open(regular(path), "rb")


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        OSError: If that fails; names the folder and the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror or error}. Choose another place") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of an open file, read from its start, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()
