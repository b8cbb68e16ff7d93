"""The order in which workers take tests: every test once, long ones first, a file's together."""

from pathlib import Path
from types import SimpleNamespace

import ordered
import pytest


def item(file: str, name: str, *, slow: bool):
    return SimpleNamespace(
        path=Path(file),
        name=name,
        get_closest_marker=lambda _: SimpleNamespace(kwargs={"seconds": 25}) if slow else None,
    )


def long(one) -> bool:
    return ordered.seconds_of(one) > 20


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_shares_begin_with_long_tests_and_take_about_as_long(workers):
    items = [item(f"test_{k}.py", f"{n}", slow=k % 4 == 0 and n == 2) for k in range(24) for n in range(5)]
    found = ordered.for_workers(items, workers)
    assert sorted(map(id, found)) == sorted(map(id, items))
    files = [one.path for one in found]
    assert sum(a != b for a, b in zip(files, files[1:], strict=False)) == 23  # each file is left once
    assert [one.name for one in found] == ["0", "1", "2", "3", "4"] * 24
    bounds = [len(found) * k // workers for k in range(workers + 1)]
    shares = [found[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    assert {sum(map(long, share)) for share in shares} == {6 // workers}
    for share in shares:
        last = max(k for k, one in enumerate(share) if long(one))
        assert last < 5 * 6 // workers
