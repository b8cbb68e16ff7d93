"""The raster of an image: the position of every token, as plain integers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Optional

Sides = tuple[int, int]  # rows and columns of codes


class Row(NamedTuple):
    """A row of codes of an image, or of its preview."""

    number: int  # in its own grid, from 0
    first: int  # its first code
    width: int  # codes
    position: int  # raster position of its first code


@dataclass(frozen=True)
class Grid:
    """A grid of `height` rows of `width` image codes, in raster order.

    With `row_end`, a row-end token follows every row (Lumina-mGPT, Emu3). It has a raster position but is not an
    image code. With `preview`, the codes of a smaller grid come first (GLM-Image).

    Raises:
        ValueError: If a side is smaller than 1, or a grid with row ends has a preview or is one.
    """

    height: int
    width: int
    row_end: bool = False
    preview: Optional["Grid"] = None

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a grid needs at least 1 row and 1 column of codes, not {self.height} x {self.width}")
        if self.preview and (self.row_end or self.preview.row_end):
            raise ValueError(f"{self}: a preview does not go with row ends")

    @property
    def sides(self) -> Sides:
        """Return the rows and columns of codes, without the preview's."""
        return self.height, self.width

    @property
    def grids(self) -> tuple["Grid", ...]:
        """Return the grids of the image in the order in which they are generated: previews, then this grid."""
        return (*(self.preview.grids if self.preview else ()), self)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Return all rows in raster order, those of the preview first."""
        before = self.preview.rows if self.preview else ()
        first = self.preview.num_codes if self.preview else 0
        return *before, *(
            Row(row, first + row * self.width, self.width, first + row * (self.width + self.row_end))
            for row in range(self.height)
        )

    @property
    def num_codes(self) -> int:
        """Return the number of image codes, those of the preview included, row ends excluded."""
        return self.height * self.width + (self.preview.num_codes if self.preview else 0)

    @property
    def num_tokens(self) -> int:
        """Return the number of raster positions: image codes and row ends."""
        return sum(row.width + self.row_end for row in self.rows)

    @property
    def row_length(self) -> int:
        """Return the tokens in the longest row, row end included; a plan with this window is next-token decoding."""
        return max(grid.width for grid in self.grids) + self.row_end

    def windows(self, window: int, preview_window: int | None = None) -> list[int]:
        """Return the window of every grid, at most its row: `preview_window`, or else `window`, for previews.

        The widest window is next-token decoding: previews then have their whole row too.

        Raises:
            ValueError: If the window is not in 1 .. row_length, or the preview's is below 1 or without a preview.
        """
        if not 1 <= window <= self.row_length:
            raise ValueError(
                f"window {window} does not fit a row of {self.row_length} tokens: use 1 .. {self.row_length}"
            )
        if preview_window is not None and self.preview is None:
            raise ValueError(f"preview_window {preview_window}: a grid of {self} codes has no preview. Leave it out")
        if preview_window is not None and preview_window < 1:
            raise ValueError(f"preview_window {preview_window} must be at least 1")
        if preview_window is None or window == self.row_length:
            preview_window = window
        sizes = [preview_window] * (len(self.grids) - 1) + [window]
        return [min(size, grid.width + grid.row_end) for size, grid in zip(sizes, self.grids, strict=True)]

    def images(self, codes: Any) -> list[Any]:
        """Split an array or tensor over codes (..., N) into one for each grid, (..., height, width), previews first."""
        found, start = [], 0
        for grid in self.grids:
            end = start + grid.height * grid.width
            found.append(codes[..., start:end].reshape(*codes.shape[:-1], grid.height, grid.width))
            start = end
        return found

    def __str__(self) -> str:
        size = f"{self.height} x {self.width}" + (" with row ends" if self.row_end else "")
        return f"{self.preview} and {size}" if self.preview else size
