"""What a run folder has logged of its validations, in its CSV files: whole after any number of resumes."""

import csv
from pathlib import Path


def validations(run: Path) -> dict[int, dict[str, float]]:
    """The numbers of a run folder's validations by the step that the log gives them, in order.

    A step that was validated twice, before and after a resume, has its last numbers.
    """
    found: dict[int, dict[str, float]] = {}
    logs = sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    for file in filter(Path.is_file, logs):
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                numbers = {name: float(text) for name, text in row.items() if name.startswith("val/") and text}
                if numbers:
                    found.setdefault(int(row["step"]), {}).update(numbers)
    return dict(sorted(found.items()))
