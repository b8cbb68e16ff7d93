"""The recipe section of published scores, which reports show next to measured ones."""

from typing import Annotated

from pydantic import Field

from zipar_train.recipe.fields import Positive, Section, Source, Window


class PaperProtocol(Section):
    """The protocol of published scores; null if the source does not state a value."""

    images: Positive | None = None
    conditions: Source | None = None
    size: Annotated[int, Field(ge=1, le=2**16)] | None = None
    reference: Source | None = None
    features: Source | None = None
    clip: Source | None = None
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_k: Annotated[int, Field(ge=0, le=65536)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    dtype: Source | None = None


class PaperRow(Section):
    window: Window
    passes: Positive
    seconds: Annotated[float, Field(gt=0, le=10**6)] | None = None  # per image, at batch size 1
    fid: Annotated[float, Field(ge=0, le=10**4)] | None = None
    clip: Annotated[float, Field(ge=0, le=100)] | None = None


class Paper(Section):
    """Published scores, which reports show next to measured ones."""

    source: Source
    protocol: PaperProtocol = PaperProtocol()
    rows: Annotated[list[PaperRow], Field(min_length=1, max_length=128)]
