"""Sizes of the blocks of a layer's kernels."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Block of a kernel.

    Attributes:
        rows: Rows of a product; attention has its own. Blocks of other rows find a weight in the L2 cache.
        columns: Outputs of a product, of each of its two halves; the keys that attention reads at once.
        depth: Elements of a product's inner dimension that are read at once, a power of two; 0 for attention.
        warps: Warps of 32 threads.
        stages: Reads in flight, where there are several.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


ONCE = 1024  # largest inner dimension that a block reads at once, before it waits for the kernel before it
# by kernel, most rows of the pass, and whether the inner dimension is larger than ONCE
TILES = {
    ("qkv", 16, False): Tile(16, 16, 1024, 4, 3),
    ("qkv", 32, False): Tile(32, 8, 1024, 4, 3),
    ("qkv", 16, True): Tile(16, 8, 512, 4, 3),
    ("qkv", 32, True): Tile(16, 8, 512, 4, 3),
    ("qkv of a head", 16, False): Tile(16, 64, 128, 4, 3),
    ("qkv of a head", 32, False): Tile(16, 64, 128, 4, 3),
    ("qkv of a head", 16, True): Tile(16, 64, 128, 4, 3),
    ("qkv of a head", 32, True): Tile(16, 64, 128, 4, 3),
    ("attend", 16, False): Tile(16, 128, 0, 8, 2),
    ("attend", 32, False): Tile(32, 64, 0, 4, 2),
    ("out", 16, False): Tile(16, 16, 1024, 4, 3),
    ("out", 32, False): Tile(32, 8, 512, 4, 3),
    ("out", 16, True): Tile(16, 16, 1024, 4, 3),
    ("out", 32, True): Tile(32, 8, 512, 4, 3),
    ("gate_up", 16, False): Tile(16, 16, 1024, 4, 3),
    ("gate_up", 32, False): Tile(32, 8, 1024, 4, 3),
    ("gate_up", 16, True): Tile(16, 8, 512, 4, 3),
    ("gate_up", 32, True): Tile(32, 8, 512, 4, 3),
    ("down", 16, False): Tile(16, 16, 1024, 4, 3),
    ("down", 32, False): Tile(32, 8, 1024, 4, 3),
    ("down", 16, True): Tile(16, 16, 1024, 4, 3),
    ("down", 32, True): Tile(32, 8, 1024, 4, 3),
}
