"""Helpers that show untrusted values and names in error messages: printable and truncated."""

import difflib
import re
from collections.abc import Iterable
from reprlib import Repr
from typing import Any

_short = Repr()
_short.maxstring = _short.maxother = 300
_short.maxlong = 60
_short.maxdict = _short.maxlist = _short.maxset = _short.maxtuple = 12
_short.maxlevel = 4


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """Return the text as one line of valid Unicode; control characters and undecodable bytes become escapes."""

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\x{code & 0xFF:02x}" if code < 0x100 or 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(escaped, text)


def safe_repr(value: Any) -> str:
    """Return the `repr` of a value, shortened if it is long."""
    try:
        return _short.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a number of thousands of digits"


def truncate(text: Any, *, length: int = 1000) -> str:
    """Return the first `length` characters of `str(text)`."""
    try:
        whole = str(text)
    except ValueError:
        return safe_repr(text)
    return whole if len(whole) <= length else f"{whole[:length]}..."


def did_you_mean(prefix: str, name: str, names: Iterable[str]) -> str:
    """Return a sentence that ends an error message: the closest known name, or all known names."""
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else f" Known: {', '.join(names)}."
