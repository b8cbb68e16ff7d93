"""The tests that need a GPU: the files that hold them, and their outcomes in a log of pytest."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[2] / "tests"


def gpu_tests() -> list[str]:
    """The test files with tests that need a GPU; the others may import what the machine lacks."""
    files = sorted(TESTS.rglob("test_*.py"))
    return [str(file.relative_to(TESTS.parent)) for file in files if re.search(r"mark\.gpu\b", file.read_text())]


def test_outcomes(log: str) -> dict[str, list[str]]:
    """Names of tests by what pytest's log says of them, also where it was cut off."""
    found: dict[str, set[str]] = {"passed": set(), "failed": set(), "error": set(), "skipped": set()}
    for before, name, after in re.findall(r"(?:\b([A-Z]+) )?(tests/\S+::\S+)(?: ([A-Z]+)\b)?", log):
        for outcome in {before.lower(), after.lower()} & found.keys():
            found[outcome].add(name)
    return {outcome: sorted(names) for outcome, names in found.items()}
