"""The names of samples in shards: unique, and such that every reader of tar files takes them as they are."""

import hashlib
from collections.abc import Iterable

from zipar_train.io.errors import printable

LONGEST = 240  # bytes: with the longest ending, `.features.npy`, one less than a file system takes as a name
_SEPARATORS = str.maketrans(dict.fromkeys("/\\.", "_"))  # webdataset's keys end at the first dot


def unique_keys(names: Iterable[str]) -> list[str]:
    """Names, of files for one, as keys: without separators, valid UTF-8, at most `LONGEST` bytes, each once.

    A long name keeps its beginning, and ends in a checksum of the whole.
    """
    keys, seen = [], set()
    for number, name in enumerate(names):
        key = _shortened(printable(name).translate(_SEPARATORS))
        while key in seen:
            key = _shortened(f"{key}-{number}")
        seen.add(key)
        keys.append(key)
    return keys


def _shortened(key: str) -> str:
    data = key.encode()
    if len(data) <= LONGEST:
        return key
    checksum = hashlib.sha256(data).hexdigest()[:16]
    return f"{data[: LONGEST - 17].decode(errors='ignore')}-{checksum}"
