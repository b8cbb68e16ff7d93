"""What stands in for the last code of a row that is not drawn yet, where the row below begins."""

from collections.abc import Sequence
from typing import Literal

from zipar_train.plan.grid import Grid

StandIn = Literal["completed", "nearest", "latest", "above", "released"]  # see `stand_in_of`
Seen = Literal["until_replaced", "by_itself"]  # by whom its key is, see `Plan.zipar`
FirstRow = Literal["complete", "overlapping"]  # whether row 1 waits for the whole of row 0


def stand_in_of(grid: Grid, drawn: Sequence[int], rule: StandIn) -> int:
    """The code that stands in for the last one of a row.

    Args:
        drawn: the latest drawn column of each row from 0 to that one.
        rule: `nearest`: the drawn code that is nearest (Euclid; ties to the lower row). `latest`: the latest of the
            row. `above`: that above the code it is fed for, the row's first. `completed`: the last of the lowest row
            that is whole (Pruna's, pruna/algorithms/zipar/utils.py). `released`: the latest of the row before (the
            released ZipAR code's, autoregressive/models/generate_zipar.py); of row 0 its latest. `completed` is the
            latest of row 0 too as long as no row is whole.
    """
    row, end = len(drawn) - 1, grid.width - 1

    def distance(above: int) -> int:
        return (row - above) ** 2 + (end - drawn[above]) ** 2

    if rule == "above":
        return grid.code(row, 0)
    whole = [above for above in range(row + 1) if drawn[above] == end]
    chosen = {
        "nearest": min(range(row, -1, -1), key=distance),
        "latest": row,
        "completed": max(whole, default=0),
        "released": max(row - 1, 0),
    }[rule]
    return grid.code(chosen, drawn[chosen])
