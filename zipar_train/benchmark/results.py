"""Results of the benchmarks, as they are written to JSON: reports with a row for each case."""

from typing import Any

from pydantic import BaseModel

from zipar_train.benchmark.turns import Failure

OURS, PLAIN, COMPILED = "zipar-train", "zipar-train, plain", "zipar-train, compiled"
AHEAD, ROUNDED = "zipar-train, lookahead", "zipar-train, int8"
EAGER, STOCK = "eager loop, as released", "transformers generate"
CAUSAL, SDPA, FLEX = "causal", "sdpa", "flex_attention"


class DecodeRow(BaseModel):
    """Result of one decoder at one window, batch size and grid; times are medians over rounds of one batch each."""

    method: str
    grid: list[int]
    window: int
    batch: int
    passes: float  # per image; with lookahead, the mean over the batch's images
    passes_spread: float | None  # with lookahead, the standard deviation over the images; otherwise None
    pass_ms: float  # with lookahead, of the passes of the image that takes the most
    spread: float  # (slowest - fastest round) / median
    image_ms: float  # time of a batch divided by its images
    images_per_second: float
    memory: int | None  # peak bytes, weights included
    # per pass: its bytes at the measured copy bandwidth, or its FLOPs at the measured rate; with lookahead, of a pass
    # in the middle of the images
    floor_ms: float
    times_floor: float
    code_match: float | None  # share of codes equal to the plain decoder's, for the same noise
    warm_ups: int  # batches before the counted rounds, until nothing was compiled and every pass was captured
    rounds: int  # counted


class GenerationReport(BaseModel):
    """Fields of all reports on the speed of generation."""

    recipe: dict[str, Any]
    dtype: str
    guidance: float
    parameters: int  # parameters used in a pass
    copy_bandwidth: float  # bytes per second, measured
    matmul_rate: float  # FLOP/s, measured
    int8_rate: float | None = None  # operations per second of products with int8 layers, measured; None: matmul_rate
    rounds: int  # requested
    failures: list[Failure]  # cases without a row
    notes: list[str]  # remarks on the rows
    environment: dict[str, str]


class DecodeReport(GenerationReport):
    """Results of `bench_decode`."""

    rows: list[DecodeRow]


class PassRow(BaseModel):
    """Result of one method's passes with a number of rows; times are medians over rounds."""

    rows: int  # of the matrix products: images x copies under guidance x slots
    slots: int  # fed of each image
    batch: int  # images
    guided: bool  # False: one copy of each slot; with a recipe's guidance, the pass of one row of each image
    method: str
    int8: bool = False  # the weights of the layers are int8; floor_ms is then int8_floor_ms
    keys: int  # slots attended to, the fed ones included
    pass_ms: float
    spread: float  # (slowest - fastest round) / median
    floor_ms: float  # its bytes at the measured copy bandwidth, or its FLOPs at the measured rate
    times_floor: float
    int8_floor_ms: float  # floor_ms of a pass with int8 weights: one byte per weight of the layers
    against_fewest: float  # time relative to the method's pass of the fewest rows, for as many images
    warm_ups: int  # rounds before the counted ones
    rounds: int  # counted


class RowsReport(GenerationReport):
    """Results of `bench_rows`."""

    passes: int  # per round
    rows: list[PassRow]


class TrainRow(BaseModel):
    """Result of one kind of step: forward, backward, clipping and optimizer; times are medians over rounds."""

    attention: str  # causal: next-token without a mask | sdpa, flex_attention: under the plan
    grid: list[int]
    window: int
    slots: int  # per image
    batch: int
    step_ms: float
    spread: float  # (slowest - fastest round) / median
    tokens_per_second: float  # predicted codes per second; stand-ins do not count
    utilisation: float  # model FLOP/s over the device's rate
    memory: int | None  # peak bytes beside weights and optimizer; None on a CPU, where it is not measured
    against_causal: float | None  # codes per second relative to the causal step; None for that step or without it
    warm_ups: int  # steps before the counted rounds, until nothing was compiled


class TrainReport(BaseModel):
    """Results of `bench_train`."""

    recipe: dict[str, Any]
    precision: str
    compiled: bool
    rate: float  # FLOP/s that utilisation refers to
    rate_is: str  # source of that rate
    rounds: int
    rows: list[TrainRow]
    failures: list[Failure]  # cases without a row
    notes: list[str]  # remarks on the rows
    environment: dict[str, str]

    def choices(self) -> dict[int, str]:
        """Return the fastest `tune.attention` for each number of slots."""
        best: dict[int, TrainRow] = {}
        for row in self.rows:
            if row.attention != CAUSAL and (
                row.slots not in best or row.tokens_per_second > best[row.slots].tokens_per_second
            ):
                best[row.slots] = row
        return {slots: row.attention for slots, row in best.items()}
