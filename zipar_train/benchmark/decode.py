"""Benchmark of generation: times per pass, image and batch, compared with the roofline floor and other decoders."""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from tqdm import tqdm

from zipar_train.benchmark.baselines import eager_loop
from zipar_train.benchmark.roofline import Rates, Work, measure
from zipar_train.benchmark.stock import Stock
from zipar_train.benchmark.subject import on_grid, subject
from zipar_train.benchmark.turns import Failure, Key, Timed, Trouble, Way, release, take_turns, whole_graphs
from zipar_train.decoding import memory
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import compile_body, fuse_for_inference
from zipar_train.decoding.place import drawing_on
from zipar_train.decoding.sampling import uniforms
from zipar_train.models.family import Family, conditions
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.run.provenance import environment

OURS, PLAIN, COMPILED = "zipar-train", "zipar-train, plain", "zipar-train, compiled"
EAGER, STOCK = "eager loop, as released", "transformers generate"


class Row(BaseModel):
    """Result of one decoder at one window, batch size and grid; times are medians over rounds of one batch each."""

    method: str
    grid: list[int]
    window: int
    batch: int
    passes: int
    pass_ms: float
    spread: float  # (slowest - fastest round) / median
    image_ms: float  # time of a batch divided by its images
    images_per_second: float
    memory: int | None  # peak bytes, weights included
    floor_ms: float  # per pass: its bytes at the measured copy bandwidth, or its FLOPs at the measured rate
    times_floor: float
    agreement: float | None  # share of codes equal to the plain decoder's, for the same uniform numbers
    warm_ups: int  # batches before the counted rounds, until nothing was compiled and every pass was captured
    rounds: int  # counted


class Report(BaseModel):
    recipe: dict[str, Any]
    dtype: str
    guidance: float
    parameters: int  # parameters used in a pass
    copy_bandwidth: float  # bytes per second, measured
    matmul_rate: float  # FLOP/s, measured
    rounds: int  # requested
    rows: list[Row]
    failures: list[Failure]  # cases without a row
    notes: list[str]  # remarks on the rows
    environment: dict[str, str]


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
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Time the generation of whole batches by a recipe's model with random weights.

    Decoders are interleaved in every round, see `turns.take_turns`. Warm-up rounds are not counted; the first one gives
    the memory of each decoder. A decoder that fails is reported under failures, and the others are measured.

    Args:
        recipe: The recipe.
        windows: Windows; those that do not fit a grid are skipped for it.
        batches: Batch sizes, in images.
        grids: Numbers of rows and columns of square grids. Empty: the recipe's own grid.
        rounds: Number of counted rounds.
        baselines: At the first batch size and grid, also measure the other decoders.
        compiled: Also measure the package's decoder with torch.compile.
        dtype: None: bfloat16 on a GPU, float32 elsewhere.
        device: None: a GPU if there is one, otherwise the CPU.
        progress: Show a progress bar.
        save: Called with the report so far after every counted round.

    Raises:
        ValueError: If no window fits, or nothing could be measured, for example if no batch fits into memory.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    sizes = [[size, size] for size in grids] or [list(recipe.model.grid)]
    fitting = [[w for w in windows if w <= on_grid(recipe.model, grid).raster.row_length] for grid in sizes]
    if not any(fitting):
        raise ValueError(f"no window of {list(windows)} fits a grid of {sizes}: use 1 .. the number of columns")
    rates = measure(device, dtype)
    report = Report(
        recipe=recipe.model_dump(),
        dtype=str(dtype).removeprefix("torch."),
        guidance=recipe.draw.guidance,
        parameters=0,
        copy_bandwidth=rates.copy,
        matmul_rate=rates.matmul,
        rounds=rounds,
        rows=[],
        failures=[],
        notes=[],
        environment=environment(device),
    )
    for place, (grid, widths) in enumerate(zip(sizes, fitting, strict=True)):
        if not widths:
            continue
        family = subject(recipe, grid, dtype=dtype, device=device)
        cases = _Cases(family, recipe, rates, baselines=baselines and not place, compiled=compiled)
        report.parameters = cases.work.body + cases.work.head
        for first, batch in enumerate(batches):
            cases.measure(
                report,
                widths,
                batch,
                rounds=rounds,
                baselines=baselines and not place and not first,
                progress=progress,
                save=save,
            )
        del family, cases  # before the next grid's model is made
    if not report.rows:
        raise ValueError(report.failures[0].error)
    return report


class _Cases:
    """Model on one grid, with a copy of its weights for each decoder that needs its own layout."""

    def __init__(self, family: Family, recipe: Recipe, rates: Rates, *, baselines: bool, compiled: bool):
        self.recipe, self.rates, self.ours = recipe, rates, family
        self.grid, self.device = family.grid, family.model.device
        family.model.eval()
        self.work = Work.of(family)
        self.weights = sum(p.nbytes for p in family.model.parameters())
        self.plain = copy.deepcopy(family) if baselines else None
        self.compiled = copy.deepcopy(family) if compiled else None
        fuse_for_inference(family.model)
        if self.compiled:
            fuse_for_inference(self.compiled.model)
            compile_body(self.compiled.model)

    def measure(
        self,
        report: Report,
        windows: Sequence[int],
        batch: int,
        *,
        rounds: int,
        baselines: bool,
        progress: bool,
        save: Callable[[Report], None],
    ) -> None:
        """Add the rows of a batch size to a report, and the failures."""
        images = batch * (2 if self.recipe.draw.guidance != 1 else 1)
        plans = {}
        for window in windows:
            plan = Plan.zipar(self.grid, window=window, prompt=self.ours.prompt_length, **self.recipe.zipar.rule)
            try:
                memory.check_memory(self.ours, plan, batch, rows=images, slots=len(plan))
            except memory.BatchTooLarge as error:
                report.failures.append(self._failure((OURS, window), batch, Trouble.of(error)))
            else:
                plans[window] = plan
        if not plans:
            return
        ways, passes = self._ways(report, plans, batch, baselines=baselines)
        needs = {
            (name, w): memory.decode_bytes(self.ours, plans[w], batch, rows=images, slots=len(plans[w]))
            for name, w in ways
        }
        groups = in_groups(needs, int(memory.free_bytes(self.device) * memory.SPARE))
        if len(groups) > 1:
            report.notes.append(
                f"{self.grid}, batch {batch}: memory does not hold all ways of drawing at once. They took turns in "
                f"{len(groups)} groups, one after the other, in the order of the rows"
            )
        bar = tqdm(
            total=len(ways) * (rounds + 1),
            desc=f"{self.grid}, batch {batch}",
            disable=not progress,
            mininterval=0.1 if sys.stderr.isatty() else 20,
        )

        def tell(key: tuple[str, int]) -> None:
            bar.total = max(bar.total, bar.n + 1)  # there may be several warm-up rounds
            bar.set_postfix_str(f"{key[0]}, window {key[1]}")
            bar.update()

        done: dict[tuple[str, int], Timed] = {}
        before = list(report.rows)

        def keep(timed: Mapping[tuple[str, int], Timed]) -> None:
            found = {**done, **timed}
            plain = {w: one.made for (name, w), one in found.items() if name == PLAIN}
            report.rows = before + [
                self._row(key, one, plans[key[1]], passes[key], batch, images, plain.get(key[1]))
                for key, one in found.items()
                if one.times and one.failure is None
            ]
            save(report)

        for group in groups:
            chosen = {key: ways[key] for key in group}
            timed = take_turns(chosen, rounds=rounds, device=self.device, before=tell, after=keep)
            done |= timed
            release(chosen.values(), self.device)
            report.failures += [
                self._failure(key, batch, one.failure) for key, one in timed.items() if one.failure is not None
            ]
            keep(timed)
        bar.close()

    def _ways(
        self, report: Report, plans: Mapping[int, Plan], batch: int, *, baselines: bool
    ) -> tuple[dict[tuple[str, int], Way], dict[tuple[str, int], int]]:
        """Return, by method and window, the functions that generate a batch, and their numbers of passes."""
        draw, plain = self.recipe.draw, self.plain
        condition = conditions(self.recipe.model, batch)
        numbers = uniforms(list(range(batch)), self.grid.codes, seed=self.recipe.seed)
        ways: dict[tuple[str, int], Way] = {}
        passes: dict[tuple[str, int], int] = {}

        def drawing(family: Family, plan: Plan, **how: Any) -> Way:
            made: list[Decoder] = []

            def run() -> Tensor:
                if not made:
                    made.append(Decoder(family, plan, **how))
                with whole_graphs():
                    return made[0](condition, numbers, draw)

            def settled() -> bool:
                return not made[0].capture or made[0].captured.complete

            return Way(run, settled, made.clear)

        def eager(window: int) -> None:
            assert plain is not None
            with drawing_on(self.device):
                eager_loop(plain, condition, numbers, draw, window=window)  # codes of another rule, not compared

        for window, plan in plans.items():
            ways[OURS, window] = drawing(self.ours, plan)
            if self.compiled:
                ways[COMPILED, window] = drawing(self.compiled, plan)
            if baselines and plain:
                ways[PLAIN, window] = drawing(plain, plan, capture=False)
                ways[EAGER, window] = Way(lambda window=window: eager(window))  # type: ignore[misc]
            passes |= {key: plan.passes for key in ways if key[1] == window}
            if baselines and plain and window == self.grid.row_length:
                stock = Stock(plain)

                def generate(stock: Stock = stock) -> None:
                    with drawing_on(self.device):
                        stock(condition, draw)  # other random numbers, not compared

                ways[STOCK, window], passes[STOCK, window] = Way(generate), stock.passes
                report.notes += stock.notes(guided=draw.guidance != 1)
        return ways, passes

    def _row(
        self, key: tuple[str, int], timed: Timed, plan: Plan, passes: int, batch: int, images: int, plain: Tensor | None
    ) -> Row:
        name, window = key
        floor = self.work.floor(plan, self.rates, rows=images, size=self.ours.model.dtype.itemsize)
        peak = timed.peaks[0]
        return Row(
            method=name,
            grid=[self.grid.height, self.grid.width],
            window=window,
            batch=batch,
            passes=passes,
            pass_ms=timed.middle / passes * 1000,
            spread=timed.spread,
            image_ms=timed.middle / batch * 1000,
            images_per_second=batch / timed.middle,
            memory=None if peak is None else self.weights + peak,
            floor_ms=floor / passes * 1000,
            times_floor=timed.middle / floor,
            agreement=None if timed.made is None or plain is None else float((timed.made == plain).float().mean()),
            warm_ups=timed.warm_ups,
            rounds=len(timed.times),
        )

    def _failure(self, key: tuple[str, int], batch: int, trouble: Trouble) -> Failure:
        name, window = key
        return Failure(
            method=name,
            grid=[self.grid.height, self.grid.width],
            window=window,
            batch=batch,
            error=trouble.error,
            trace=trouble.trace,
        )


def in_groups(needs: Mapping[Key, int], room: int) -> list[list[Key]]:
    """Split keys, in order, into as few groups as memory allows; one that exceeds it is a group of its own.

    Args:
        needs: Bytes that each key keeps allocated between its turns.
        room: Available bytes.
    """
    groups: list[list[Key]] = []
    used = 0
    for key, need in needs.items():
        if not groups or used + need > room:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += need
    return groups
