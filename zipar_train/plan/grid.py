"""The raster of an image: the position of every token, as plain integers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """A grid of `height` rows of `width` image codes, in raster order.

    With `row_end`, a row-end token follows every row (Lumina-mGPT, Emu3). It has a raster position but is not an
    image code.

    Raises:
        ValueError: If a side is smaller than 1.
    """

    height: int
    width: int
    row_end: bool = False

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a grid needs at least 1 row and 1 column of codes, not {self.height} x {self.width}")

    @property
    def num_codes(self) -> int:
        """Return the number of image codes in the grid, row ends excluded."""
        return self.height * self.width

    @property
    def row_length(self) -> int:
        """Return the tokens in a row, row end included; a plan with this window is next-token decoding."""
        return self.width + self.row_end

    def code(self, row: int, column: int) -> int:
        """Return the index of an image code in raster order, row ends excluded, 0 .. num_codes - 1."""
        return row * self.width + column

    def row(self, code: int) -> int:
        """Return the row of an image code."""
        return code // self.width

    def position(self, row: int, column: int) -> int:
        """Return a token's raster position, row ends included, as rotary embeddings and causality use it."""
        return row * self.row_length + column

    def __str__(self) -> str:
        return f"{self.height} x {self.width}" + (" with row ends" if self.row_end else "")
