"""The base class of all recipe sections, and the ranges of their numbers. Does not import torch."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SIDE = 1024  # maximum rows, and maximum columns, of codes

Positive = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0, le=1)]  # a fraction of 1
Window = Annotated[int, Field(ge=1, le=SIDE + 1)]  # tokens of the row above; + 1 for a row-end token
Windows = Annotated[list[Window], Field(min_length=1, max_length=128)]
Weight = Annotated[float, Field(ge=1e-4, le=1e4)]  # relative to the other weights of a mix
Side = Annotated[int, Field(ge=1, le=SIDE)]  # codes
Heads = Annotated[int, Field(ge=1, le=1024)]  # attention heads per layer
Vocabulary = Annotated[int, Field(ge=1, le=2**20)]  # number of token ids, or of classes
Tokens = Annotated[int, Field(ge=1, le=4096)]  # prompt length
Batch = Annotated[int, Field(ge=1, le=2**16)]  # images
Source = Annotated[str, Field(min_length=1, max_length=1024)]  # a path, a URL, or a Hugging Face hub id
Name = Annotated[str, Field(min_length=1, max_length=128)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def scaled(grid: Sequence[int], shorter: int) -> tuple[int, int] | None:
    """Return the height and width in pixels of an image whose shorter side is given; None if a side is not whole."""
    rows, columns = grid
    if shorter * max(grid) % min(grid):
        return None
    return shorter * rows // min(grid), shorter * columns // min(grid)
