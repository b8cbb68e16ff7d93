"""Benchmark of single passes by the number of rows of their matrix products, compared with the roofline."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from zipar_train.benchmark.decode import in_groups
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import EAGER, PassRow, RowsReport
from zipar_train.benchmark.roofline import Rates, Work, measure, middle
from zipar_train.benchmark.row_methods import METHODS, Asked, MethodRun, Setting, passes_of
from zipar_train.benchmark.turns import Failure, Timed, Trouble, Way, release, take_turns, turns_bar
from zipar_train.decoding import memory
from zipar_train.models.family import Family, build
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.run.provenance import environment


class Size(NamedTuple):
    """Size of a pass: R rows for each image are K slots, or 2 K under guidance."""

    rows: int  # of one image
    slots: int
    guided: bool


Case = tuple[str, Size]  # a method's name, and a pass


def bench_rows(
    recipe: Recipe,
    *,
    rows: Sequence[int],
    batches: Sequence[int] = (1,),
    rounds: int = 3,
    baselines: bool = True,
    compiled: bool = False,
    int8: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    save: Callable[[RowsReport], None] = lambda report: None,
) -> RowsReport:
    """Time single passes of a recipe's model with random weights, by the number of rows of their matrix products.

    All passes are on the next-token plan, at the same place in the middle of the images, see `roofline.middle`. They
    are without lookahead, which is a method of its own if the recipe sets `sampling.lookahead`. A round makes several
    passes of each number of rows with each of `METHODS`; they take turns in every round.

    Args:
        recipe: The recipe.
        rows: Numbers of rows of one image: its slots, twice under guidance. 1 row is then an unguided pass.
        batches: Batch sizes, in images. Each image has these rows.
        rounds: Number of counted rounds.
        baselines: Also measure the released loop.
        compiled: Also measure the package's decoder with torch.compile.
        int8: Also measure the package's decoder with int8 weights.
        dtype: None: bfloat16 on a GPU, float32 elsewhere.
        device: None: a GPU if there is one, otherwise the CPU.
        progress: Show a progress bar.
        save: Called with the report so far after every counted round.

    Raises:
        ValueError: If a number of rows is odd under guidance, or more than an image has, or nothing could be measured,
            for example if no batch fits into memory.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    plan = Plan.raster(recipe.model.raster, prompt=recipe.model.prompt)
    sizes = sizes_of(rows, plan, guided=recipe.sampling.guidance != 1)
    rates = measure(device, dtype)
    sketch = build(recipe.model, dtype=dtype, device="meta", empty=True)
    work = Work.of(sketch)
    report = RowsReport(
        recipe=recipe.model_dump(),
        dtype=str(dtype).removeprefix("torch."),
        guidance=recipe.sampling.guidance,
        parameters=work.body + work.head,
        copy_bandwidth=rates.copy,
        matmul_rate=rates.matmul,
        int8_rate=rates.int8,
        rounds=rounds,
        passes=passes_of(device),
        rows=[],
        failures=[],
        notes=_notes(plan, sizes, guided=recipe.sampling.guidance != 1, baselines=baselines),
        environment=environment(device),
    )
    asked = Asked(recipe, device, baselines=baselines, compiled=compiled, int8=int8)
    for batch in batches:
        _Batch(asked, plan, sketch, batch, work, rates).add_to(report, sizes, progress=progress, save=save)
    if not report.rows:
        raise ValueError(report.failures[0].error)
    return report


def sizes_of(rows: Sequence[int], plan: Plan, *, guided: bool) -> list[Size]:
    """Return the passes of these numbers of rows of one image, in ascending order.

    Raises:
        ValueError: If a number is odd under guidance and not 1, or more than an image has.
    """
    copies, found = 2 if guided else 1, []
    for number in sorted(set(rows)):
        if guided and number % 2 and number > 1:
            raise ValueError(
                f"{number} rows are no guided pass, which has 2 for each slot: use an even number, 1 for an unguided "
                "pass, or --set sampling.guidance=1"
            )
        size = Size(number, max(number // copies, 1), guided and number > 1)
        if size.slots > (largest := len(plan) - plan.prompt):
            raise ValueError(
                f"{number} rows feed {size.slots} slots, more than an image of {plan.grid} has: use 1 .. "
                f"{largest * copies}"
            )
        found.append(size)
    return found


def _notes(plan: Plan, sizes: Sequence[Size], *, guided: bool, baselines: bool) -> list[str]:
    """Return remarks on the rows of the report."""
    found = [
        f"each pass is one of next-token's plan in the middle of an image: it attends to half of the {len(plan)} "
        "slots, or to the prompt and its own slots where these are more"
    ]
    if guided and not sizes[0].guided:
        found.append("1 row of an image is an unguided pass of 1 slot; guided passes have 2 rows for each slot")
    if baselines:
        most = Plan.zipar(plan.grid, window=1, stand_in="released", prompt=plan.prompt).width
        found.append(
            f"{EAGER}: these passes feed consecutive codes. Those of a whole image feed one code of each active row of "
            f"the image, at most {most} slots here, with the same operations for each slot"
        )
    return found


class _Batch:
    """Batch of images, whose passes are timed by their rows."""

    def __init__(self, asked: Asked, plan: Plan, sketch: Family, batch: int, work: Work, rates: Rates):
        self.asked, self.plan, self.sketch, self.batch = asked, plan, sketch, batch
        self.work, self.rates, self.device = work, rates, asked.device
        self.weights = sum(p.nbytes for p in sketch.model.parameters())

    def add_to(
        self, report: RowsReport, sizes: Sequence[Size], *, progress: bool, save: Callable[[RowsReport], None]
    ) -> None:
        """Time the passes, and add their rows and failures to a report."""
        methods = [name for name, method in METHODS.items() if method.when(self.asked)]
        fitting = [size for size in sizes if self._fits(report, size, methods)]
        if not fitting:
            return
        before, done = list(report.rows), dict[Case, Timed]()

        def keep(timed: Mapping[Case, Timed]) -> None:
            found = {**done, **timed}
            seconds = {case: one.middle for case, one in found.items() if one.times and one.failure is None}
            report.rows = before + [
                self._row(name, size, found[name, size], seconds)
                for size in fitting
                for name in methods
                if (name, size) in seconds
            ]
            save(report)

        turns = len(methods) * len(fitting) * (report.rounds + 1)
        with turns_bar(turns, title=f"{self.plan.grid}, batch {self.batch}", progress=progress) as bar:

            def tell(case: Case) -> None:
                bar(f"{case[0]}, {case[1].rows} rows")

            for group in self._groups(report, methods, fitting):
                runs = {name: MethodRun(METHODS[name], self._build, self._settings(fitting)) for name in group}
                ways = {
                    (name, size): Way(partial(run, size.slots, guided=size.guided))
                    for size in fitting
                    for name, run in runs.items()
                }
                try:
                    timed = take_turns(ways, rounds=report.rounds, device=self.device, before=tell, after=keep)
                finally:
                    release([Way(lambda: None, release=run.release) for run in runs.values()], self.device)
                done |= timed
                report.failures += [self._failure(*case, one.failure) for case, one in timed.items() if one.failure]
                keep(timed)

    def _build(self) -> Family:
        """Return a model with random weights, the same in each call."""
        model = self.asked.recipe.model
        seed, dtype = self.asked.recipe.seed, self.sketch.model.dtype
        return random_family(model, model.grid, seed=seed, dtype=dtype, device=self.device)

    def _settings(self, sizes: Sequence[Size]) -> dict[bool, Setting]:
        """Return the images with and without guidance, each for the most slots of its passes."""
        most = {size.guided: size.slots for size in sizes}  # in ascending order
        return {
            guided: Setting(self.asked.recipe, self.plan, self.batch, guided, slots) for guided, slots in most.items()
        }

    def _bytes(self, setting: Setting) -> int:
        """Return the bytes of a cache and its largest pass."""
        rows = self.batch * (2 if setting.guided else 1)
        slots, most = len(self.plan), setting.most
        return memory.decode_bytes(self.sketch, self.plan, self.batch, rows=rows, slots=slots, lookahead=most)

    def _fits(self, report: RowsReport, size: Size, methods: Sequence[str]) -> bool:
        """Return True if memory holds the weights and this pass; otherwise each method gets a failure."""
        want = self.weights + sum(map(self._bytes, self._settings([size]).values()))
        room = memory.free_bytes(self.device)
        if want <= room * memory.SPARE:
            return True
        error = (
            f"{self.batch:,} images at once with {size.rows} rows each need {want / 2**30:.1f} GiB with the weights, "
            f"and {self.device} has {room / 2**30:.1f} GiB left: use fewer rows or images, or a smaller model"
        )
        report.failures += [self._failure(name, size, Trouble(error, "")) for name in methods]
        return False

    def _groups(self, report: RowsReport, methods: Sequence[str], sizes: Sequence[Size]) -> list[list[str]]:
        """Return the methods in groups that memory holds at once; several groups are a note of the report."""
        need = self.weights + sum(map(self._bytes, self._settings(sizes).values()))
        groups = in_groups(dict.fromkeys(methods, need), int(memory.free_bytes(self.device) * memory.SPARE))
        if len(groups) > 1:
            report.notes.append(
                f"batch {self.batch}: memory does not hold all methods at once. They took turns in {len(groups)} "
                f"groups, one after the other: {'; '.join(', '.join(group) for group in groups)}"
            )
        return groups

    def _row(self, name: str, size: Size, timed: Timed, seconds: Mapping[Case, float]) -> PassRow:
        """Return the result of a method's pass.

        Args:
            name: The method.
            size: The pass.
            timed: Its measurements.
            seconds: Median seconds of a round of every case.
        """
        taken, element = timed.middle / passes_of(self.device), self.sketch.model.dtype.itemsize
        copies = self.batch * (2 if size.guided else 1)
        floor, int8_floor = (
            self.work.middle_floor(self.plan, self.rates, slots=size.slots, rows=copies, size=element, int8=int8)
            for int8 in (METHODS[name].int8, True)
        )
        fewest = min(other.rows for method, other in seconds if method == name)
        (least,) = (took for (method, other), took in seconds.items() if (method, other.rows) == (name, fewest))
        return PassRow(
            rows=copies * size.slots,
            slots=size.slots,
            batch=self.batch,
            guided=size.guided,
            method=name,
            int8=METHODS[name].int8,
            keys=middle(self.plan, size.slots),
            pass_ms=taken * 1000,
            spread=timed.spread,
            floor_ms=floor * 1000,
            times_floor=taken / floor,
            int8_floor_ms=int8_floor * 1000,
            against_fewest=timed.middle / least,
            warm_ups=timed.warm_ups,
            rounds=len(timed.times),
        )

    def _failure(self, name: str, size: Size, trouble: Trouble) -> Failure:
        """Return the failure of a method's pass."""
        grid = self.plan.grid
        return Failure(
            method=f"{name}, {size.rows} rows",
            grid=[*grid.sides],
            window=self.plan.window,
            batch=self.batch,
            error=trouble.error,
            trace=trouble.trace,
        )
