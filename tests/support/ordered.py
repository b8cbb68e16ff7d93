"""The order of tests for several workers: each begins with long ones, so that none is left with one at the end.

pytest-xdist's `worksteal` hands each worker an equal share of the list, and moves the end of a share to idle workers.
"""

from collections.abc import Sequence
from typing import Any

LONG, SLOW, QUICK = 10.0, 4.0, 0.15  # seconds: of the tests that shares begin with at least, and on average of others


def for_workers(items: Sequence[Any], workers: int) -> list[Any]:
    """Shares of about equal length in seconds, one after another; a file's tests stay together, since they share."""
    files: dict[Any, list[Any]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    shares: list[list[list[Any]]] = [[] for _ in range(workers)]
    for file in sorted(files.values(), key=seconds, reverse=True):
        min(shares, key=lambda share: sum(map(seconds, share))).append(file)
    return [item for share in shares for file in sorted(share, key=no_long_test) for item in file]


def seconds(file: list[Any]) -> float:
    return sum(seconds_of(item) for item in file)


def no_long_test(file: list[Any]) -> bool:
    return not any(seconds_of(item) >= LONG for item in file)


def seconds_of(item: Any) -> float:
    """Return about how long a test takes: the argument of its mark `slow`, or the average of its kind."""
    mark = item.get_closest_marker("slow")
    return QUICK if mark is None else mark.kwargs.get("seconds", SLOW)
