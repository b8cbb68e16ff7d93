"""The code that stands in for a row's last code when the row below starts before that code exists."""

from collections.abc import Sequence
from typing import Literal

from zipar_train.plan.grid import Row

StandIn = Literal["completed", "nearest", "released"]  # see `stand_in_of`
FirstRow = Literal["complete", "overlapping"]  # whether row 1 waits for the whole of row 0


def stand_in_of(rows: Sequence[Row], latest: Sequence[int], rule: StandIn) -> int:
    """Return the code that stands in for the last code of a row.

    Args:
        rows: The rows of its grid, from row 0 to that row.
        latest: The latest generated column of each of them.
        rule: `nearest`: the nearest generated code (Euclidean distance; the lower row wins ties). `completed`: the last
            code of the lowest complete row, or the latest of row 0 while no row is complete (Pruna,
            pruna/algorithms/zipar/utils.py). `released`: the latest code of the row before, or of row 0 itself
            (released ZipAR code, autoregressive/models/generate_zipar.py).
    """
    row, end = len(latest) - 1, rows[0].width - 1

    def distance(above: int) -> int:
        return (row - above) ** 2 + (end - latest[above]) ** 2

    whole = [above for above in range(row + 1) if latest[above] == end]
    chosen = {
        "nearest": min(range(row, -1, -1), key=distance),
        "completed": max(whole, default=0),
        "released": max(row - 1, 0),
    }[rule]
    return rows[chosen].first + latest[chosen]
