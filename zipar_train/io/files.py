"""Files that appear whole or not at all, in folders that can be made, told apart by their checksums."""

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
FIGURES = ("", ".png", ".pdf", ".svg")  # endings of figures; without one, PNG
CLAIM = ".claimed"  # the file that says so


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it there: it appears whole or not at all.

    Raises:
        OSError: naming the file; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # process numbers repeat across containers
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
    """Hold a folder against other processes, on this machine or others; a process that dies lets go of it.

    Args:
        rank, world: the number of this process among those that share the work, and their count. Each holds the
            folder once, so that a second launch of the same work is refused.

    Raises:
        ValueError: if another holds it; says who.
        OSError: if the folder cannot be written.
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
                continue  # whoever held it before has removed it meanwhile
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                if world == 1:  # else others may hold it still
                    with suppress(OSError):
                        (folder / CLAIM).unlink()
            return


def _lock(file: IO[str], rank: int, world: int) -> None:
    """Lock a file's bytes without waiting: all for a lone process, else the one of this rank among `world` processes.

    Loader processes do not inherit such locks: they may outlive the process that holds the folder.

    Raises:
        BlockingIOError: if another process has the same rank, or belongs to another number of processes.
    """
    import fcntl  # what Windows lacks

    def lock(how: int, start: int, length: int = 0) -> None:  # length 0: to the end, wherever that will be
        fcntl.lockf(file, how, length, start)

    now, most = fcntl.LOCK_EX | fcntl.LOCK_NB, 2**20
    lock(fcntl.LOCK_EX, 0, 1)  # held for a moment: one process looks at a time
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
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def regular(path: Path) -> Path:
    """The path itself, if it leads to a regular file, which opens and reads without waiting for another program.

    A pipe that a shell hands over, as in `--file <(command)`, is taken too: the command ends it.

    Raises:
        OSError: naming the file, if it is missing, a folder, a pipe, a socket or a device.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and str(path).startswith(HANDED)):
        return path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, not a file")
    kind = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
    raise OSError(f"{path} is a {kind}, not a file: reading it might never end")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, in bytes.

    Raises:
        OSError: as `regular`, or if it may not be read.
    """
    return open(regular(path), "rb")


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        OSError: naming the folder and the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror or error}. Choose another place") from error


def sha256(path: Path) -> str:
    """A file's checksum, 64 hexadecimal digits."""
    with open_regular(path) as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """The checksum of an open file from its start, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()
