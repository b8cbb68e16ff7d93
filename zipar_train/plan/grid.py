"""The raster of an image: which token stands where. Pure integers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """`height` rows of `width` image codes, in raster order.

    With `row_end`, the model's vocabulary has a row-end token that closes every row (Lumina-mGPT, Emu3);
    it takes a raster position but is no image code.

    Raises:
        ValueError: if a side is smaller than 1.
    """

    height: int
    width: int
    row_end: bool = False

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a grid needs at least 1 row and 1 column of codes, not {self.height} x {self.width}")

    @property
    def codes(self) -> int:
        """Image codes in the grid, row ends not counted."""
        return self.height * self.width

    @property
    def row_length(self) -> int:
        """Tokens in a row, its row end counted: the widest window, at which a plan is next-token decoding."""
        return self.width + self.row_end

    def code(self, row: int, column: int) -> int:
        """Index of an image code among the image codes, 0 .. codes - 1."""
        return row * self.width + column

    def row(self, code: int) -> int:
        """The row that an image code stands in."""
        return code // self.width

    def position(self, row: int, column: int) -> int:
        """Raster position of a token, row ends counted: what rotary embeddings see and causality compares."""
        return row * self.row_length + column

    def __str__(self) -> str:
        return f"{self.height} x {self.width}" + (" with row ends" if self.row_end else "")
