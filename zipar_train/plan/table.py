"""The plan of an image: one table of slots in decode order, from which everything else follows.

A slot is one token fed to the model once. The training mask, the teacher-forced inputs, the loss, the decode loop
and the pass count are all derived from this table; no other part of the project depends on windows.

ZipAR (arXiv 2412.04062, section 3.2) starts a row as soon as `window` codes of the row above are generated. Its
equation 1 reads `window + 1`; its tables, its released code and this package use `window`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from zipar_train.plan.grid import Grid
from zipar_train.plan.stand_in import FirstRow, StandIn, stand_in_of

PROMPT, ROW_END = -1, -2  # `source` of slots that do not feed an image code
NEVER = 2**31 - 1  # `expires` of keys that never expire

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """A decoding schedule: five integer vectors of length S, sorted by (step, position).

    step: The forward pass that feeds the slot; the prompt is pass 0.
    source: The image code that the slot feeds, or PROMPT, or ROW_END.
    position: Its raster position; the P prompt tokens have positions -P .. -1.
    target: The image code that its logits predict, or -1. Every code is the target of exactly one slot.
    expires: The first pass that no longer attends to its key (NEVER except for stand-ins and discarded attempts).
    """

    grid: Grid
    window: int
    prompt: int
    step: Integers
    source: Integers
    position: Integers
    target: Integers
    expires: Integers

    @classmethod
    def zipar(
        cls,
        grid: Grid,
        *,
        window: int,
        stand_in: StandIn = "completed",
        first_row: FirstRow = "complete",
        preview_window: int | None = None,
        prompt: int = 1,
    ) -> "Plan":
        """Return the plan that starts each row when `window` tokens of the row above exist.

        Without row ends, the first code of a row needs the last code of the row above as its input before that code
        exists. A stand-in slot then feeds another, already generated code at that position, and expires in the pass
        that feeds the real code. With row ends, the row-end token is known beforehand and counts as one of the
        window's tokens, no stand-in is needed, and row 0 is like the others.

        Args:
            window: The tokens of a row that must exist before the next row starts.
            stand_in: The code that stands in, see `stand_in_of`.
            first_row: Without row ends: row 1 waits for all of row 0 ("complete"), as in the released code and the
                paper's pass counts, or starts like the others ("overlapping").
            preview_window: The window of the grid's preview, at most a row of it. None: `window`. With the widest
                `window`, the preview is also decoded next-token. Every grid starts when the one before it is complete.

        Raises:
            ValueError: If the window is not in 1 .. row_length, the preview's is below 1 or without a preview, a choice
                is unknown, or `prompt` is below 1.
        """
        _known(first_row=(first_row, FirstRow))
        opens, start = [], 0
        for each, size in zip(grid.grids, grid.windows(window, preview_window), strict=True):
            gap = size - 1 if grid.row_end else size  # a row end is known beforehand: it takes no pass
            second = each.width if first_row == "complete" and not grid.row_end else gap  # passes before row 1 opens
            opens += [start, *(start + second + gap * row for row in range(each.height - 1))]
            start = opens[-1] + each.width
        return cls.opened(grid, opens, window=window, stand_in=stand_in, prompt=prompt)

    @classmethod
    def opened(
        cls,
        grid: Grid,
        opens: Sequence[int],
        *,
        window: int,
        tries: Sequence[int] | None = None,
        stand_in: StandIn = "completed",
        prompt: int = 1,
    ) -> "Plan":
        """Return the plan that generates the first code of each row in a given pass.

        Args:
            opens: The passes of all rows, starting at 0. The distance to the row above is 1 .. row width (from 0 with
                row ends), and its whole width where a preview ends.
            window: The plan's `window`.
            tries: For each row, rejected attempts of an adaptive window: the number of passes right before in which the
                stand-in or row end is also fed, but no code is kept. Only the attempt itself attends to its key.

        Raises:
            ValueError: If a choice is unknown, or `prompt` is below 1.
        """
        _known(stand_in=(stand_in, StandIn))
        if prompt < 1:
            raise ValueError(f"prompt {prompt} is too short: the first code needs at least 1 token before it")
        rows = grid.rows
        assert len(opens) == len(rows) and opens[0] == 0, opens
        for (above, start), (row, begin) in pairwise(zip(rows, opens, strict=True)):
            least = above.width if row.number == 0 else 0 if grid.row_end else 1
            assert least <= begin - start <= above.width, opens
        last = opens[-1] + rows[-1].width - 1

        slots = [(0, PROMPT, i - prompt, 0 if i == prompt - 1 else -1, NEVER) for i in range(prompt)]
        for index, row in enumerate(rows):
            for column in range(row.width - 1):
                code = row.first + column
                slots.append((opens[index] + column + 1, code, row.position + column, code + 1, NEVER))
            fed = opens[index] + row.width  # the pass that feeds the row's last code
            code, position = row.first + row.width - 1, row.position + row.width - 1
            if index + 1 == len(rows):
                break
            below = opens[index + 1]
            first = below - (tries[index + 1] if tries else 0)
            if grid.row_end:
                slots.append((fed, code, position, -1, NEVER))
                slots.append((below, ROW_END, position + 1, code + 1, NEVER))
                slots += [(step, ROW_END, position + 1, -1, step + 1) for step in range(first, below)]
                continue
            slots.append((fed, code, position, code + 1 if fed == below else -1, NEVER))
            top = index - row.number  # row 0 of the same grid
            for step in range(first, min(below + 1, fed)):
                latest = [min(step - opened, row.width) - 1 for opened in opens[top : index + 1]]
                target, expires = (code + 1, fed) if step == below else (-1, step + 1)
                stand = stand_in_of(rows[top : index + 1], latest, stand_in)
                slots.append((step, stand, position, target, expires))

        table = np.array([slot for slot in slots if slot[0] <= last], dtype=np.int64)
        columns = table[np.lexsort((table[:, 2], table[:, 0]))].T.copy()
        columns.setflags(write=False)
        return cls(grid, window, prompt, *columns)

    @classmethod
    def raster(cls, grid: Grid, *, prompt: int = 1) -> "Plan":
        """Return the plan of next-token decoding, which has the widest window."""
        return cls.zipar(grid, window=grid.row_length, prompt=prompt)

    @property
    def passes(self) -> int:
        """Return the number of forward passes per image, including the prompt's."""
        return int(self.step[-1]) + 1

    @property
    def width(self) -> int:
        """Return the largest number of slots in one pass; of the prompt, only the last token counts."""
        return int(np.bincount(self.step[self.position >= -1]).max())

    @property
    def reduction(self) -> float:
        """Return the fraction of next-token decoding's passes that this plan saves, 0 .. 1."""
        return 1 - self.passes / self.grid.num_codes

    def predicting(self) -> Integers:
        """Return the slot that predicts each code, int64 (N,)."""
        slots = np.flatnonzero(self.target >= 0)
        return slots[self.target[slots].argsort()]

    def slots_ahead(self, lookahead: int) -> int:
        """Return how many slots a pass with lookahead feeds: at least the widest pass's, at most all of the image."""
        return min(max(lookahead, self.width), len(self) - self.prompt + 1) if lookahead else 0

    def generated_at(self) -> Integers:
        """Return the pass that generates each code, int64 (N,)."""
        return self.step[self.predicting()]

    def visible(self) -> NDArray[np.bool_]:
        """Return the attention visibility as bool (S, S), row = query, column = key."""
        q, k = np.arange(len(self.step))[:, None], np.arange(len(self.step))[None, :]
        return sees(self.step, self.position, self.expires, q, k)

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        size = f"{len(self)} slots in {self.passes} passes of at most {self.width}"
        return f"Plan({self.grid}, window {self.window}: {size})"


def sees(step: Any, position: Any, expires: Any, q: Any, k: Any) -> Any:
    """Return True where slot `q` attends to the key of slot `k`: the visibility rule, for NumPy arrays and tensors."""
    return (step[k] <= step[q]) & (step[q] < expires[k]) & (position[k] <= position[q])


def _known(**choices: tuple[str, Any]) -> None:
    for name, (value, kind) in choices.items():
        if value not in get_args(kind):
            raise ValueError(f"{name} {value!r} is unknown: use {', '.join(map(repr, get_args(kind)))}")
