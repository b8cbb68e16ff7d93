"""What all sections of a recipe share: how strictly they are read, and the ranges of numbers. Imports no torch."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SIDE = 1024  # most rows, and most columns, of codes

Positive = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0, le=1)]
Window = Annotated[int, Field(ge=1, le=SIDE + 1)]
Windows = Annotated[list[Window], Field(min_length=1, max_length=128)]
Weight = Annotated[float, Field(ge=1e-4, le=1e4)]
Side = Annotated[int, Field(ge=1, le=SIDE)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Vocabulary = Annotated[int, Field(ge=1, le=2**20)]
Tokens = Annotated[int, Field(ge=1, le=4096)]
Batch = Annotated[int, Field(ge=1, le=2**16)]
Source = Annotated[str, Field(min_length=1, max_length=1024)]  # a path, a URL, or an id on a hub
Name = Annotated[str, Field(min_length=1, max_length=128)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def scaled(grid: Sequence[int], shorter: int) -> tuple[int, int] | None:
    """Height and width in pixels of a grid's images, by their shorter side; None: the other is no whole number."""
    rows, columns = grid
    if shorter * max(grid) % min(grid):
        return None
    return shorter * rows // min(grid), shorter * columns // min(grid)
