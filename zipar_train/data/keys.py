"""Keys of samples in shards: unique, and valid for every reader of tar files."""

import hashlib
from collections.abc import Iterable

from zipar_train.io.errors import printable

LONGEST = 240  # bytes; with the longest extension, `.features.npy`, names stay below the 255 bytes of file systems
_SEPARATORS = str.maketrans(dict.fromkeys("/\\.", "_"))  # webdataset's keys end at the first dot


def unique_keys(names: Iterable[str]) -> list[str]:
    """Convert names, such as file names, to unique keys without separators, valid UTF-8 of at most `LONGEST` bytes.

    A long name keeps its beginning and ends in a checksum of the full name.
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
