"""The plan of an image: one table of slots in decode order, from which everything else follows.

A slot is one token fed to the model once. The training mask, the teacher-forced inputs, the loss, the decode loop
and the pass count are all readings of this table; nothing else in the project knows about windows.

ZipAR (arXiv 2412.04062, section 3.2) opens a row as soon as `window` codes of the row above are drawn. Its equation 1
reads `window + 1`; its tables and its released code count `window`, and so do we.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zipar_train.grid import Grid

PROMPT, ROW_END = -1, -2  # what a slot feeds when it feeds no image code
NEVER = 2**31 - 1  # a pass that never comes

StandIn = Literal["nearest", "released"]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """Five integer vectors of length S, sorted by (step, position).

    step: the forward pass that feeds the slot; the prompt is pass 0.
    source: the image code it feeds, or PROMPT, or ROW_END.
    position: its raster position; the P prompt tokens stand at -P .. -1.
    target: the image code its logits predict, -1 for none. Every code is the target of exactly one slot.
    expires: the first pass that no longer sees its key (stand-ins only, NEVER for all others).
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
    def zipar(cls, grid: Grid, *, window: int, stand_in: StandIn = "nearest", prompt: int = 1) -> "Plan":
        """The plan that opens each row when `window` tokens of the row above exist.

        Without row ends, row 0 is drawn alone, and the first code of a row needs the last code of the row above as its
        input before that code exists: a stand-in slot feeds another, drawn code at that position, and expires in the
        pass that feeds the real one. `stand_in` says which code: the `nearest` drawn one (Euclid; ties to the lower
        row), or the latest of the row two above, as the `released` ZipAR code has it.

        With row ends, row 0 is like the others, the row-end token counts as one of the window's tokens, and nothing
        stands in: the row-end token is known beforehand.

        Raises:
            ValueError: if `window` is not in 1 .. grid.row_length, or `stand_in` is unknown, or `prompt` is below 1.
        """
        if not 1 <= window <= grid.row_length:
            raise ValueError(
                f"window {window} does not fit a row of {grid.row_length} tokens: use 1 .. {grid.row_length}"
            )
        if stand_in not in ("nearest", "released"):
            raise ValueError(f"stand_in {stand_in!r} is unknown: use 'nearest' or 'released'")
        if prompt < 1:
            raise ValueError(f"prompt {prompt} is too short: the first code needs at least 1 token before it")

        height, width = grid.height, grid.width
        if grid.row_end:
            opens = [row * (window - 1) for row in range(height)]
        else:
            opens = [0] + [width + (row - 1) * window for row in range(1, height)]  # the pass that draws (row, 0)
        last = opens[-1] + width - 1

        slots = [(0, PROMPT, i - prompt, 0 if i == prompt - 1 else -1, NEVER) for i in range(prompt)]
        for row in range(height):
            for column in range(width - 1):
                code = grid.code(row, column)
                slots.append((opens[row] + column + 1, code, grid.position(row, column), code + 1, NEVER))
            fed = opens[row] + width  # the pass that feeds the row's last code
            code, position = grid.code(row, width - 1), grid.position(row, width - 1)
            if row + 1 == height:
                break
            if grid.row_end:
                slots.append((fed, code, position, -1, NEVER))
                slots.append((opens[row + 1], ROW_END, position + 1, code + 1, NEVER))
            elif fed == opens[row + 1]:
                slots.append((fed, code, position, code + 1, NEVER))
            else:
                stands = _stand_in(grid, opens, row, stand_in)
                slots.append((opens[row + 1], stands, position, code + 1, fed))
                slots.append((fed, code, position, -1, NEVER))

        table = np.array([slot for slot in slots if slot[0] <= last], dtype=np.int64)
        columns = table[np.lexsort((table[:, 2], table[:, 0]))].T.copy()
        columns.setflags(write=False)
        return cls(grid, window, prompt, *columns)

    @classmethod
    def raster(cls, grid: Grid, *, prompt: int = 1) -> "Plan":
        """Next-token decoding: the widest window."""
        return cls.zipar(grid, window=grid.row_length, prompt=prompt)

    @property
    def passes(self) -> int:
        """Forward passes an image takes, the prompt's included."""
        return int(self.step[-1]) + 1

    @property
    def width(self) -> int:
        """Most slots that one pass feeds, of a longer prompt its last token alone."""
        return int(np.bincount(self.step[self.position >= -1]).max())

    @property
    def reduction(self) -> float:
        """Share of next-token decoding's passes that this plan saves, 0 .. 1."""
        return 1 - self.passes / self.grid.codes

    def drawn(self) -> Integers:
        """The pass that draws each code, (H, W)."""
        passes = np.empty(self.grid.codes, dtype=np.int64)
        passes[self.target[self.target >= 0]] = self.step[self.target >= 0]
        return passes.reshape(self.grid.height, self.grid.width)

    def visible(self) -> NDArray[np.bool_]:
        """Who sees whom: bool (S, S), row = query, column = key."""
        q, k = np.arange(len(self.step))[:, None], np.arange(len(self.step))[None, :]
        return sees(self.step, self.position, self.expires, q, k)

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        size = f"{len(self)} slots in {self.passes} passes of at most {self.width}"
        return f"Plan({self.grid}, window {self.window}: {size})"


def sees(step, position, expires, q, k):
    """The one visibility rule, for numpy arrays and for torch tensors: may slot `q` attend to the key of slot `k`?"""
    return (step[k] <= step[q]) & (step[q] < expires[k]) & (position[k] <= position[q])


def _stand_in(grid: Grid, opens: list[int], row: int, rule: StandIn) -> int:
    """The drawn code that stands in for the last code of `row` when the row below opens."""
    drawn = [
        min(opens[row + 1] - opens[above], grid.width) - 1 for above in range(row + 1)
    ]  # latest column of each row
    if rule == "released":
        return grid.code(row - 1, drawn[row - 1])

    def distance(above: int) -> int:
        return (row - above) ** 2 + (grid.width - 1 - drawn[above]) ** 2

    nearest = min(range(row, -1, -1), key=distance)
    return grid.code(nearest, drawn[nearest])
