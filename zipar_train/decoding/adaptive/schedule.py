"""Row schedule of one image under an adaptive window: open rows, slots of the next pass, and the resulting plan.

A row is tried as soon as `window` tokens of the row above exist, at least one of them a code: its first code is sampled
but not fed yet. Each following pass sees one more code of the row above and verifies the first code, until it is
accepted, or at the latest until the row above is complete.
"""

from typing import Literal, NamedTuple

from zipar_train.plan.grid import Grid
from zipar_train.plan.stand_in import FirstRow, StandIn, stand_in_of
from zipar_train.plan.table import NEVER, PROMPT, ROW_END, Plan


class SlotInput(NamedTuple):
    """One slot of the next forward pass."""

    source: int  # code, or ROW_END
    position: int
    target: int = -1  # the code that its logits predict, -1: none
    expires: int = NEVER
    task: Literal["none", "sample", "try", "settle"] = "none"  # how the target is handled
    tried: int = 0  # earlier tries


class RowSchedule:
    """Schedule of one image's rows under an adaptive window.

    Args:
        grid, stand_in, first_row, preview_window, prompt: See `Plan.zipar`.
        window: The smallest window, in codes.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        window: int,
        stand_in: StandIn,
        first_row: FirstRow,
        preview_window: int | None,
        prompt: int,
    ):
        self.grid, self.rows, self.window, self.stand_in, self.prompt = grid, grid.rows, window, stand_in, prompt
        sizes = zip(grid.grids, grid.windows(window, preview_window), strict=True)
        self.windows = [size for each, size in sizes for _ in range(each.height)]  # the smallest, by row
        self.alone = first_row == "complete" and not grid.row_end
        self.opens = [0]  # for each open row, the pass that predicted its first code
        self.tries = [0] * len(self.rows)

    @property
    def attempts(self) -> int:
        """Most attempts to start a row that can be rejected."""
        return sum(
            row.width + self.grid.row_end - window
            for row, window in zip(self.rows, self.windows, strict=True)
            if row.number
        )

    @property
    def last(self) -> int | None:
        """Pass that predicts the image's last code; None until all rows are open."""
        return self.opens[-1] + self.rows[-1].width - 1 if len(self.opens) == len(self.rows) else None

    def feeds(self, step: int) -> list[SlotInput]:
        """Return the slots that pass `step` feeds, sorted by position; pass 0 feeds the prompt."""
        found: list[SlotInput] = []
        if step == 0:
            prompt = [SlotInput(PROMPT, at) for at in range(-self.prompt, 0)]
            return [*prompt[:-1], prompt[-1]._replace(target=0, task="sample")]
        for index, opened in enumerate(self.opens):
            row, column = self.rows[index], step - opened - 1  # predicted in the previous pass
            code = row.first + column
            if column < row.width - 1:
                found.append(SlotInput(code, row.position + column, code + 1, task="sample"))
            elif column == row.width - 1 and index + 1 < len(self.rows):
                found.append(SlotInput(code, row.position + column))
        return found if self.last is not None else [*found[:-1], *self._start(step, found[-1])]

    def _start(self, step: int, above: SlotInput) -> list[SlotInput]:
        """Return the slots for the first code of the next row to open, including the latest code of the row above."""
        index = len(self.opens) - 1
        row, below = self.rows[index], self.rows[index + 1]
        top = index - row.number  # row 0 of the same grid
        counts = [min(step - opened, row.width) for opened in self.opens[top:]]
        code, tried, row_end = below.first, self.tries[index + 1], self.grid.row_end
        whole = counts[-1] == row.width  # the pass feeds the row's last code
        task: Literal["try", "settle"] = "settle" if whole else "try"
        if whole and not row_end:
            return [above._replace(target=code, task=task, tried=tried)]
        waits = below.number == 0 or (row.number == 0 and self.alone)  # for the whole row
        if waits or counts[-1] + row_end < self.windows[index + 1]:
            return [above]
        position = row.position + row.width - 1
        if row_end:
            return [above, SlotInput(ROW_END, position + 1, code, NEVER if whole else step + 1, task, tried)]
        source = stand_in_of(self.rows[top : index + 1], [count - 1 for count in counts], self.stand_in)
        return [above, SlotInput(source, position, code, step + 1, task, tried)]

    def settle(self, step: int, feed: SlotInput, accepted: bool) -> int:
        """Record the result of a try and return the pass in which its key expires."""
        row = len(self.opens)
        if not accepted:
            self.tries[row] += 1
            return feed.expires
        self.opens.append(step)
        if feed.expires == NEVER or self.grid.row_end:
            return NEVER
        return self.opens[row - 1] + self.rows[row - 1].width

    @property
    def passes(self) -> int:
        """Number of forward passes of the image."""
        assert self.last is not None
        return self.last + 1

    def plan(self) -> Plan:
        """Return the plan that the image was generated with."""
        assert self.last is not None
        return Plan.opened(
            self.grid,
            self.opens,
            window=self.window,
            tries=self.tries,
            stand_in=self.stand_in,
            prompt=self.prompt,
        )
