"""Batches of codes and conditions."""

from typing import Any, NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    codes: torch.Tensor  # int64 (B, N), raster order, those of a preview first
    condition: Any  # classes int64 (B,), or B captions as str or as features (n, F)
    keys: list[str] = []  # `shard/sample` of each of the B images
    sides: tuple[int, int] | None = None  # rows and columns of codes of all B images; None: the recipe's


def collate(chunk: list[tuple[Any, Any, str]]) -> Batch:
    """Return the batch of images, given as codes (N,), condition and key."""
    codes, conditions, keys = zip(*chunk, strict=True)
    condition: Any = list(conditions)
    if isinstance(conditions[0], int):
        condition = torch.tensor(conditions)
    elif all(isinstance(each, np.ndarray) for each in conditions):
        condition = [torch.from_numpy(features) for features in conditions]
    return Batch(torch.from_numpy(np.stack(codes).astype(np.int64)), condition, list(keys))


def joined(parts: list[Batch]) -> Batch:
    """Return batches joined to one; their images have the same grid."""
    conditions: list[Any] = [part.condition for part in parts]
    condition: Any = sum(conditions, []) if isinstance(conditions[0], list) else torch.cat(conditions)
    return Batch(torch.cat([part.codes for part in parts]), condition, sum((part.keys for part in parts), []))
