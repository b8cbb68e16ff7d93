"""The manifest of a shard set: what every sample is like, and the count and checksum of every shard."""

import hashlib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zipar_train.plan.grid import Grid
from zipar_train.recipe.fields import Side, Vocabulary

UNRECORDED = ("class_names", "prompt")  # fields that older manifests lack, whatever their images are
LATER = (*UNRECORDED, "preview", "other_grids")  # all optional fields that older manifests lack

Sides = tuple[Side, Side]  # rows and columns of codes


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str = Field(min_length=1, max_length=255)
    samples: int = Field(ge=1, le=10**6)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    grid: Sides | None = None  # of its samples; None: the manifest's
    preview: Sides | None = None  # if `grid` is given: the preview of its samples


class Layout(BaseModel):
    """The format of all samples of a shard set; `grid` is rows and columns of codes, `classes` is None for captions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    source: str
    grid: Sides
    preview: Sides | None = None  # grid of the preview that every sample also has; None: no preview
    other_grids: tuple[Sides, ...] | None = None  # grids that some shards have instead
    codes: int = Field(ge=1, le=2**16)
    classes: Vocabulary | None = None
    views: str = "one"  # kind of views of each image
    tokenizer: str | None = None  # SHA-256 of the tokenizer's file
    features: bool = False  # whether caption features are stored
    images: int | None = Field(default=None, ge=0)  # images in the source, unreadable ones included
    class_names: tuple[str, ...] | None = None  # by class number; None: not known, or the numbers themselves
    prompt: str | None = None  # fingerprint of the prompt format that every caption was checked against

    def grid_of(self, shard: Shard | None = None) -> Grid:
        """Return the grid of a shard's samples, without row ends; None: the grid that the set is named after."""
        sides, preview = (
            (self.grid, self.preview) if shard is None or shard.grid is None else (shard.grid, shard.preview)
        )
        return Grid(*sides, preview=Grid(*preview) if preview else None)


class Manifest(Layout):
    """The format, the shards and the number of skipped images of a shard set."""

    skipped: int = Field(default=0, ge=0)  # images that could not be read
    shards: tuple[Shard, ...]

    @model_validator(mode="after")
    def _named(self) -> "Manifest":
        if self.class_names is not None and len(set(self.class_names)) != self.classes:
            raise ValueError(f"class_names holds {len(set(self.class_names))} names for {self.classes} classes")
        return self

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def checksum(self) -> str:
        """Return the SHA-256 of the set as 64 hexadecimal digits; unset later fields do not change it."""
        return hashlib.sha256(self.model_dump_json(exclude=self.unset).encode()).hexdigest()

    @property
    def unset(self) -> dict[str, Any]:
        """Return the fields that older manifests lack and that are unset here, as pydantic's `exclude`."""
        unset: dict[str, Any] = {name: True for name in LATER if getattr(self, name) is None}
        if all(shard.grid is None for shard in self.shards):
            unset["shards"] = {"__all__": {"grid", "preview"}}
        return unset

    def split(self) -> list[tuple[Grid, tuple[Shard, ...]]]:
        """Return each grid that occurs, with its shards; in the order of first occurrence."""
        found: dict[Grid, list[Shard]] = {}
        for shard in self.shards:
            found.setdefault(self.grid_of(shard), []).append(shard)
        return [(grid, tuple(shards)) for grid, shards in found.items()]
