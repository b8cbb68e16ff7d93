"""What a pass, an image and a batch take, beside their floor and beside other ways of drawing."""

import copy
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from tqdm import tqdm

from zipar_train.benchmark.baseline import eager_loop, stock_generate
from zipar_train.benchmark.floor import Rates, Work, measure, wait
from zipar_train.decoding.body import compile_body, streamline
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.memory import Peak, make_room
from zipar_train.decoding.sampling import uniforms
from zipar_train.environment import environment
from zipar_train.models.family import Family, build, conditions
from zipar_train.plan import Plan
from zipar_train.sections import Recipe

OURS, PLAIN, COMPILED = "zipar-train", "zipar-train, plain", "zipar-train, compiled"
EAGER, STOCK = "eager loop, as released", "transformers generate"


class Row(BaseModel):
    """One way of drawing at one window, batch and grid. Times are medians over rounds, an image or a batch each."""

    method: str
    grid: list[int]
    window: int
    batch: int
    passes: int
    pass_ms: float
    spread: float  # (slowest - fastest round) / median
    image_ms: float  # of a batch, divided by its images
    images_per_second: float
    memory: int | None  # bytes at most: the weights and what drawing took beside them
    floor_ms: float  # a pass: its bytes at the measured copy bandwidth, or its operations at the measured rate
    times_floor: float
    agreement: float | None  # share of codes that are the plain decoder's, for the same uniforms


class Report(BaseModel):
    recipe: dict[str, Any]
    dtype: str
    guidance: float
    parameters: int  # that a pass multiplies by
    copy_bandwidth: float  # bytes a second, measured
    matmul_rate: float  # operations a second, measured
    rounds: int
    rows: list[Row]
    environment: dict[str, str]


Way = Callable[[], Tensor | None]  # draws one batch; codes, if they are for comparing


def bench_decode(
    recipe: Recipe,
    *,
    windows: Sequence[int],
    batches: Sequence[int] = (1,),
    grids: Sequence[int] = (),
    rounds: int = 3,
    baselines: bool = True,
    compiled: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Report:
    """Time whole batches of a recipe's model at random weights.

    Every round gives each way of drawing its turn, so that a machine that slows down does so for all alike; a first
    round warms up, is not counted, and says how much memory each takes.

    Args:
        windows: those that a grid is too narrow for are left out of it.
        batches: images at once.
        grids: rows and columns; none: the recipe's own.
        baselines: beside the first batch and grid, also the other ways; otherwise ours alone.
        compiled: our decoder with torch.compile too.
        dtype: None: bfloat16 on a GPU, float32 elsewhere.

    Raises:
        ValueError: if no window fits, or a batch does not fit into memory.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    rates = measure(device, dtype)
    sizes = [[size, size] for size in grids] or [recipe.model.grid]
    rows: list[Row] = []
    total = 0
    for place, grid in enumerate(sizes):
        model = recipe.model.model_copy(update={"grid": list(grid), "tokenizer": None, "tokenizer_weights": None})
        fitting = [window for window in windows if window <= model.raster.row_length]
        total += len(fitting)
        if fitting:
            torch.manual_seed(recipe.seed)
            cases = _Cases(build(model, dtype=dtype, device=device), recipe, rates, compiled=compiled)
            for first, batch in enumerate(batches):
                others = baselines and not place and not first
                rows += cases.rows(fitting, batch, rounds=rounds, baselines=others, progress=progress)
            parameters = cases.work.body + cases.work.head
    if not total:
        raise ValueError(f"no window of {list(windows)} fits a grid of {sizes}: use 1 .. the number of columns")
    return Report(
        recipe=recipe.model_dump(),
        dtype=str(dtype).removeprefix("torch."),
        guidance=recipe.draw.guidance,
        parameters=parameters,
        copy_bandwidth=rates.copy,
        matmul_rate=rates.matmul,
        rounds=rounds,
        rows=rows,
        environment=environment(device),
    )


class _Cases:
    """A model on a grid, its weights in each of the orders that the ways of drawing want."""

    def __init__(self, family: Family, recipe: Recipe, rates: Rates, *, compiled: bool):
        self.plain, self.recipe, self.rates = family, recipe, rates
        family.model.eval()
        self.work = Work.of(family)
        self.weights = sum(p.nbytes for p in family.model.parameters())
        self.ours = self._copied()
        streamline(self.ours.model)
        self.compiled = None
        if compiled:
            self.compiled = self._copied()
            streamline(self.compiled.model)
            compile_body(self.compiled.model)

    def _copied(self) -> Family:
        return copy.deepcopy(self.plain)

    def rows(self, windows: Sequence[int], batch: int, *, rounds: int, baselines: bool, progress: bool) -> list[Row]:
        draw, family = self.recipe.draw, self.plain
        images = batch * (2 if draw.guidance != 1 else 1)
        plans = {
            w: Plan.zipar(family.grid, window=w, prompt=family.prompt_length, **self.recipe.zipar.rule) for w in windows
        }
        for plan in plans.values():
            make_room(family, plan, batch, rows=images, slots=len(plan))
        condition = conditions(self.recipe.model, batch)
        numbers = uniforms(list(range(batch)), family.grid.codes, seed=self.recipe.seed)
        ways: dict[tuple[str, int], Way] = {}
        for window, plan in plans.items():
            made = {OURS: Decoder(self.ours, plan)}
            if self.compiled:
                made[COMPILED] = Decoder(self.compiled, plan)
            if baselines:
                made[PLAIN] = Decoder(family, plan, capture=False)
            for name, decoder in made.items():
                ways[name, window] = lambda decoder=decoder: decoder(condition, numbers, draw)  # type: ignore[misc]
            if baselines:
                ways[EAGER, window] = lambda window=window: _nothing(  # type: ignore[misc]
                    eager_loop(family, condition, numbers, draw, window=window)
                )
                if window == family.grid.row_length and not family.grid.row_end:
                    ways[STOCK, window] = lambda: _nothing(stock_generate(family, condition, draw))
        times: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
        codes, memory = {}, {}
        bar = tqdm(total=len(ways) * (rounds + 1), desc=f"{family.grid}, batch {batch}", disable=not progress,
                   mininterval=0.1 if sys.stderr.isatty() else 20)  # fmt: skip
        for turn in range(rounds + 1):
            for key, way in ways.items():
                bar.set_postfix_str(f"{key[0]}, window {key[1]}")
                wait(family.model.device)
                with Peak(family.model.device) as peak:
                    start = perf_counter()
                    drawn = way()
                    wait(family.model.device)
                    times[key].append(perf_counter() - start)
                if not turn:
                    codes[key] = None if drawn is None else drawn.cpu()
                    memory[key] = None if peak.bytes is None else self.weights + peak.bytes
                bar.update()
        bar.close()
        rows = []
        for (name, window), taken in times.items():
            plan, middle = plans[window], median(taken[1:])
            floor = self.work.floor(plan, self.rates, rows=images, size=family.model.dtype.itemsize)
            rows.append(
                Row(
                    method=name,
                    grid=[family.grid.height, family.grid.width],
                    window=window,
                    batch=batch,
                    passes=plan.passes,
                    pass_ms=middle / plan.passes * 1000,
                    spread=(max(taken[1:]) - min(taken[1:])) / middle,
                    image_ms=middle / batch * 1000,
                    images_per_second=batch / middle,
                    memory=memory[name, window],
                    floor_ms=floor / plan.passes * 1000,
                    times_floor=middle / floor,
                    agreement=_agreement(codes[name, window], codes.get((PLAIN, window))),
                )
            )
        return rows


def _nothing(codes: Tensor) -> None:
    """Codes that are not comparable: drawn under another rule, or from other random numbers."""


def _agreement(codes: Tensor | None, plain: Tensor | None) -> float | None:
    return None if codes is None or plain is None else float((codes == plain).float().mean())
