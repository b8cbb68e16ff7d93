"""What a training has logged, from the CSV files of its run folder."""

import csv
from pathlib import Path


def logged(run: Path) -> list[dict[str, float]]:
    """The rows, in their order; a row has the numbers that were logged together."""
    rows: list[dict[str, float]] = []
    for file in sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda file: int(file.parent.name[8:])):
        with file.open(newline="") as lines:
            rows += [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(lines)]
    return rows


def last(rows: list[dict[str, float]]) -> dict[str, float]:
    """The last number of each kind."""
    told: dict[str, float] = {}
    for row in rows:
        told |= row
    return told
