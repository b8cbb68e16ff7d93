"""A sample of a shard: the codes of one image and its condition, checked against the layout of its shard set."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zipar_train.data.manifest import Layout
from zipar_train.plan.grid import Grid


class Sample(NamedTuple):
    key: str
    codes: NDArray[np.integer]  # (A, H, W)
    condition: int | str  # class or caption
    features: NDArray[np.float16] | None = None  # features of the caption, (n, F)
    preview: NDArray[np.integer] | None = None  # (A, H', W')


def _check_codes(codes: NDArray[np.integer], grid: Grid, layout: Layout, *, where: str) -> None:
    if codes.ndim != 3 or not len(codes) or codes.shape[1:] != grid.sides:
        raise ValueError(f"{where}: codes of shape {codes.shape}, not (views, {grid.height}, {grid.width})")
    if codes.dtype.kind not in "ui":
        raise ValueError(f"{where}: codes of type {codes.dtype}, not integers")
    if codes.max() >= layout.codes or codes.min() < 0:
        outside = codes[(codes < 0) | (codes >= layout.codes)]
        raise ValueError(
            f"{where}: code {outside[0]} is outside a codebook of {layout.codes} codes (0 .. {layout.codes - 1})"
        )


def check_sample(sample: Sample, layout: Layout, grid: Grid, *, where: str) -> None:
    """Check a sample against the layout and the grid of its shard.

    Raises:
        ValueError: If it does not fit; begins with `where`.
    """
    _check_codes(sample.codes, grid, layout, where=where)
    if (grid.preview is None) != (sample.preview is None):
        expected = "a preview, which its manifest does not list" if grid.preview is None else "no codes of the preview"
        raise ValueError(f"{where}: {expected}. Make the shard again")
    if grid.preview and sample.preview is not None:
        _check_codes(sample.preview, grid.preview, layout, where=f"{where}, preview")
        if len(sample.preview) != len(sample.codes):
            raise ValueError(f"{where}: {len(sample.codes)} views, and {len(sample.preview)} of the preview")
    if layout.classes and not (isinstance(sample.condition, int) and 0 <= sample.condition < layout.classes):
        raise ValueError(f"{where}: class {sample.condition} is outside 0 .. {layout.classes - 1}")
    if not layout.classes and not str(sample.condition).strip():
        raise ValueError(f"{where}: an empty caption")
    if (features := sample.features) is None:
        if layout.features:
            raise ValueError(f"{where}: no features, which its manifest promises")
        return
    if layout.classes or features.ndim != 2 or not features.size or features.dtype.kind != "f":
        raise ValueError(
            f"{where}: features of shape {features.shape} and type {features.dtype}, not (tokens, width) of a caption"
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(features.astype(np.float16)).all():
            raise ValueError(f"{where}: features that are not all finite in float16")
