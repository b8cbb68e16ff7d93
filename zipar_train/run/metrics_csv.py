"""Validation metrics from the CSV logs of a run folder, complete after any number of resumes."""

import csv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def validations(run: Path) -> dict[int, dict[str, float]]:
    """Return the validation metrics of a run folder by logged step, in order.

    A step that was validated twice, before and after a resume, has its latest values.
    """
    found: dict[int, dict[str, float]] = {}
    files = filter(Path.is_file, (run / "logs").glob("version_*/metrics.csv"))
    logs = {file.parent.name.partition("_")[2]: file for file in files}
    for number in sorted(filter(str.isdecimal, logs), key=int):
        for row in whole_rows(logs[number]):
            numbers = {name: value for name, value in row.items() if name.startswith("val/")}
            if numbers:
                found.setdefault(int(row["step"]), {}).update(numbers)
    return dict(sorted(found.items()))


def whole_rows(file: Path) -> Iterator[dict[str, float]]:
    """Yield the rows of a CSV log, without empty fields.

    A row that a kill or a full disk has truncated is skipped: it lacks its line end, fields or digits.
    """
    text = file.read_bytes().decode(errors="replace")
    whole = text[: text.rfind("\n") + 1].splitlines()
    header, *rows = list(csv.reader(line for line in whole if "\0" not in line)) or [[]]
    for row in rows:
        with suppress(ValueError):
            named = zip(header, row, strict=True)
            numbers = {name: float(field) for name, field in named if field}
            if numbers.get("step", -1) >= 0:
                yield numbers
