"""Sizes of the blocks of a layer's kernels, by the rows of a pass."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Block of a kernel.

    Attributes:
        columns: Outputs of a product, of each of its two halves; the keys that attention reads at once.
        depth: Elements of the inner dimension that are read at once; a power of two.
        warps: Warps of 32 threads.
        stages: Reads in flight.
    """

    columns: int
    depth: int
    warps: int
    stages: int


TILES = {
    ("qkv", 16): Tile(8, 512, 8, 3),
    ("qkv", 32): Tile(8, 512, 8, 3),
    ("attend", 16): Tile(64, 0, 4, 3),
    ("attend", 32): Tile(64, 0, 4, 3),
    ("out", 16): Tile(8, 512, 8, 3),
    ("out", 32): Tile(8, 512, 8, 3),
    ("gate_up", 16): Tile(8, 512, 8, 3),
    ("gate_up", 32): Tile(8, 512, 8, 3),
    ("down", 16): Tile(8, 512, 8, 3),
    ("down", 32): Tile(8, 512, 8, 3),
}
