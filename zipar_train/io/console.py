"""Standard output and standard error that survive full disks, closed pipes and narrow encodings."""

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

ROOM = 2**20  # most bytes buffered while a disk is full
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN)  # transient errors: a later write may succeed


class Lasting(io.TextIOBase):
    """A text stream that does not raise when writing fails.

    While a disk is full, up to `ROOM` bytes of text are buffered. Lines are counted as lost when the reader of a pipe
    has closed it. Characters that the encoding lacks are written as `backslashreplace` escapes.

    Args:
        stream: The wrapped stream. If it has no file descriptor, it is written through its own methods.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.lost, self.reason, self.process = stream, 0, "", os.getpid()
        self.waiting = b""
        self.encoder = codecs.getincrementalencoder(self.encoding)("backslashreplace")
        try:
            stream.flush()
            self.number = stream.fileno() if os.name == "posix" else None
        except (OSError, ValueError, AttributeError):
            self.number = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    @property
    def buffer(self) -> Any:
        return self.stream.buffer

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        data = self.encoder.encode(text)
        if self.process != os.getpid():  # after a fork, the buffered text belongs to the parent
            self.process, self.waiting = os.getpid(), b""
        if self.number is None:
            try:
                self.stream.write(codecs.decode(data, self.encoding))
            except (OSError, ValueError) as error:
                self._lose(data, error)
            return len(text)
        self.waiting += data
        if "\n" in text or "\r" in text or len(self.waiting) > ROOM:
            self.flush()
        return len(text)

    def flush(self) -> None:
        if self.number is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._lose(b"", error)
            return
        data, self.waiting = self.waiting, b""
        try:
            while data:
                data = data[os.write(self.number, data) :]
        except OSError as error:
            keep = data[-ROOM:] if error.errno in PASSING else b""
            self.waiting = keep + self.waiting
            self._lose(data[: len(data) - len(keep)], error)

    def disk_full(self) -> bool:
        """Return True if output is lost or still buffered, unless the reason is a closed pipe."""
        self.flush()
        return bool(self.lost or self.waiting) and self.reason != os.strerror(errno.EPIPE)

    def finish(self) -> None:
        """Write the buffered text, or count it as lost."""
        self.flush()
        self.lost, self.waiting = self.lost + self.waiting.count(b"\n"), b""

    def _lose(self, data: bytes, error: Exception) -> None:
        first, self.reason = not self.reason, getattr(error, "strerror", None) or str(error)
        self.lost += data.count(b"\n")
        if first and self is sys.stdout:
            print(f"zipar-train: standard output cannot be written ({self.reason}); the work goes on", file=sys.stderr)


@contextmanager
def lasting() -> Iterator[Lasting]:
    """Replace standard output and standard error by `Lasting` streams in this block; report lost lines at its end."""
    before = sys.stdout, sys.stderr
    out, err = (Lasting(stream if stream is not None else open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.finish()
        if out.lost:
            print(f"zipar-train: {out.lost:,} lines of standard output are lost ({out.reason})", file=err)
        err.finish()
        sys.stdout, sys.stderr = before
