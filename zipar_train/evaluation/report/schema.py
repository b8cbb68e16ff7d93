"""Schema of an evaluation's report: results, and everything needed to check and repeat them."""

from typing import Any

from pydantic import BaseModel
from torch import Tensor

from zipar_train.decoding.generator import DecodeMode
from zipar_train.evaluation.report.protocol import Protocol
from zipar_train.evaluation.scores.scores import Score

Samples = dict[tuple[str, int], Tensor]  # uint8 (images, 3, height, width) by EvaluationRow.name and window


class EvaluationRow(BaseModel):
    """Result of one checkpoint at one window; None: not measured, without reference, held-out codes or second batch."""

    checkpoint: str
    mode: DecodeMode  # see `Generator.generate`
    lookahead: int = 0  # slots fed per pass; 0: those of a step
    window: int  # for adaptive windows the smallest
    passes: float  # per image: the mean over images
    passes_std: float = 0.0  # standard deviation over images; 0 without lookahead and adaptive windows
    reduction: float  # share of the next-token passes saved
    width: int | None  # slots of the widest pass; None for adaptive windows
    bits: float | None  # exact bits per code, on held-out images under this window's mask
    window_costs: float | None  # bits relative to this checkpoint's next-token bits, minus 1
    gap_closed: float | None  # see EvaluationReport
    milliseconds: float  # per image, at batch size 1
    images_per_second: float | None  # at the recipe's batch size, one process
    fid: Score | None = None
    sfid: Score | None = None
    kid: Score | None = None
    isc: Score | None = None
    precision: Score | None = None
    recall: Score | None = None
    class_accuracy: Score | None = None  # share of images that the classifier assigns to their class
    clip: Score | None = None

    @property
    def name(self) -> str:
        mode = {"planned": "", "released": ", as released", "adaptive": ", adaptive"}[self.mode]
        return self.checkpoint + mode + (f", lookahead {self.lookahead}" if self.lookahead else "")


SCORES = ("fid", "sfid", "kid", "isc", "precision", "recall", "class_accuracy", "clip")


class EvaluationReport(BaseModel):
    """Report of an evaluation: all rows, and how they were measured.

    `gap_closed` at a window: the gap is the baseline's bits at that window minus its own next-token bits. The value is
    the share of the gap that this checkpoint closes. None if the gap is below 0.5 % of the next-token bits.
    """

    rows: list[EvaluationRow]
    baseline: str | None
    protocol: Protocol
    warnings: list[str]
    differences: list[str]  # differences from the protocol of the published scores
    features_accuracy: float | None  # accuracy of the classifier on held-out images
    held_out: str | None  # description of the images for bits
    checkpoints: dict[str, str]  # name: path and hash
    recipe: dict[str, Any]
    environment: dict[str, str]

    def row(self, checkpoint: str, window: int, *, mode: DecodeMode = "planned", lookahead: int = 0) -> EvaluationRow:
        wanted = (checkpoint, window, mode, lookahead)
        return next(row for row in self.rows if (row.checkpoint, row.window, row.mode, row.lookahead) == wanted)

    def measured(self, score: str) -> bool:
        """Return True if any row has the score."""
        return any(getattr(row, score) is not None for row in self.rows)
