"""What an evaluation found, with what it takes to believe and repeat it."""

from typing import Any

from pydantic import BaseModel
from torch import Tensor

from zipar_train.decoding.generator import DecodeMode
from zipar_train.evaluation.report.protocol import Protocol
from zipar_train.evaluation.scores.scores import Score

Samples = dict[tuple[str, int], Tensor]  # by Row.name and window: uint8 (images, 3, height, width)


class Row(BaseModel):
    """One checkpoint at one window. None: not measured, for want of a reference, held-out codes or a second batch."""

    checkpoint: str
    manner: DecodeMode  # of drawing, see `Generator.generate`
    window: int  # of an adaptive one the smallest
    passes: float  # of an adaptive window the mean over images
    reduction: float  # share of next-token's passes saved
    width: int | None  # most slots a pass; None: each image its own
    bits: float | None  # a code, on held-out images under this window's mask; exact
    window_costs: float | None  # share of bits more than this checkpoint's own next-token bits
    gap_closed: float | None  # of bits, see Report
    milliseconds: float  # an image, drawn alone
    images_per_second: float | None  # at the recipe's batch size, one process
    fid: Score | None = None
    sfid: Score | None = None
    kid: Score | None = None
    isc: Score | None = None
    precision: Score | None = None
    recall: Score | None = None
    agreement: Score | None = None  # share of drawn images that the classifier names as their class
    clip: Score | None = None

    @property
    def name(self) -> str:
        return self.checkpoint + {"planned": "", "released": ", as released", "adaptive": ", adaptive"}[self.manner]


SCORES = ("fid", "sfid", "kid", "isc", "precision", "recall", "agreement", "clip")


class Report(BaseModel):
    """Every row, and how it was measured.

    `gap_closed` of a checkpoint and window: of the bits that the first compared checkpoint loses at that window
    against its own next-token bits, the share this checkpoint does not lose. None where nothing (below 0.5 %) is lost.
    """

    rows: list[Row]
    baseline: str | None
    protocol: Protocol
    warnings: list[str]
    departures: list[str]  # from how the recipe's published scores were measured
    features_accuracy: float | None  # of the classifier, on held-out images
    held_out: str | None  # whose bits are counted
    checkpoints: dict[str, str]  # name: path and hash
    recipe: dict[str, Any]
    environment: dict[str, str]

    def row(self, checkpoint: str, window: int, *, manner: DecodeMode = "planned") -> Row:
        wanted = (checkpoint, window, manner)
        return next(row for row in self.rows if (row.checkpoint, row.window, row.manner) == wanted)

    def measured(self, score: str) -> bool:
        """Whether any row has the score."""
        return any(getattr(row, score) is not None for row in self.rows)
