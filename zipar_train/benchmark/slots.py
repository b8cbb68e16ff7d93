"""Benchmark of passes that feed several slots of each image, as lookahead makes them, compared with the roofline."""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import SlotReport, SlotRow
from zipar_train.benchmark.roofline import Rates, Work, measure, middle
from zipar_train.benchmark.turns import Failure, Timed, Trouble, Way, release, take_turns
from zipar_train.decoding import memory
from zipar_train.decoding.decoder import Decoder, Shape
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.place import inference_on
from zipar_train.decoding.sampling import code_seeds
from zipar_train.decoding.state import DecodeState, prompts
from zipar_train.models.family import conditions
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.run.provenance import environment

PASSES = 10  # per round: the first of a shape runs eagerly, the second is captured


def bench_slots(
    recipe: Recipe,
    *,
    slots: Sequence[int],
    batches: Sequence[int] = (1,),
    rounds: int = 3,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    save: Callable[[SlotReport], None] = lambda report: None,
) -> SlotReport:
    """Time passes with lookahead of a recipe's model with random weights, by the number of slots that they feed.

    Every pass is one of `Decoder`, on the next-token plan, at the same place in the middle of the images, see
    `roofline.middle`. A round makes several passes of each number of slots; the numbers take turns in every round. The
    host's looks at the progress between passes are not included.

    Args:
        recipe: The recipe; `sampling.lookahead` has no effect.
        slots: Numbers of slots that a pass feeds of each image.
        batches: Batch sizes, in images.
        rounds: Number of counted rounds.
        dtype: None: bfloat16 on a GPU, float32 elsewhere.
        device: None: a GPU if there is one, otherwise the CPU.
        progress: Show a progress bar.
        save: Called with the report so far after every counted round.

    Raises:
        ValueError: If an image has fewer slots, or nothing could be measured, for example if no batch fits into memory.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    plan, slots = Plan.raster(recipe.model.raster, prompt=recipe.model.prompt), sorted(set(slots))
    if slots[-1] > (largest := len(plan) - plan.prompt):
        raise ValueError(f"{slots[-1]} slots are more than an image of {plan.grid} has: use 1 .. {largest}")
    rates = measure(device, dtype)
    family = random_family(recipe.model, recipe.model.grid, seed=recipe.seed, dtype=dtype, device=device)
    work = Work.of(family)
    fuse_for_inference(family.model)
    decoder = Decoder(family, plan)
    report = SlotReport(
        recipe=recipe.model_dump(),
        dtype=str(dtype).removeprefix("torch."),
        guidance=recipe.sampling.guidance,
        parameters=work.body + work.head,
        copy_bandwidth=rates.copy,
        matmul_rate=rates.matmul,
        rounds=rounds,
        passes=PASSES,
        rows=[],
        failures=[],
        notes=[
            f"each row is a pass of next-token's plan in the middle of an image: it attends to half of the {len(plan)} "
            "slots, or to the prompt and its own slots where these are more"
        ],
        environment=environment(device),
    )
    for batch in batches:
        _Batch(decoder, recipe, batch, work, rates).add_to(report, slots, progress=progress, save=save)
    if not report.rows:
        raise ValueError(report.failures[0].error)
    return report


class _Batch:
    """Batch of images, whose passes are timed by the number of slots."""

    def __init__(self, decoder: Decoder, recipe: Recipe, batch: int, work: Work, rates: Rates):
        self.decoder, self.recipe, self.batch, self.work, self.rates = decoder, recipe, batch, work, rates
        self.guided = recipe.sampling.guidance != 1
        self.rows = batch * (2 if self.guided else 1)  # of the cache
        self.filled = False  # the state, up to the middle of the images

    def add_to(
        self, report: SlotReport, slots: Sequence[int], *, progress: bool, save: Callable[[SlotReport], None]
    ) -> None:
        """Time the passes, and add their rows and failures to a report."""
        device, before = self.decoder.family.model.device, list(report.rows)
        fitting = [number for number in slots if self._fits(report, number)]
        if not fitting:
            return
        ways = {number: Way(partial(self._repeat, number, most=fitting[-1])) for number in fitting}

        def keep(timed: dict[int, Timed]) -> None:
            done = {number: one for number, one in timed.items() if one.times and one.failure is None}
            one_slot = done[1].middle if 1 in done else None
            report.rows = before + [self._row(number, one, one_slot) for number, one in done.items()]
            save(report)

        with tqdm(
            total=len(ways) * (report.rounds + 1),
            desc=f"{self.decoder.plan.grid}, batch {self.batch}",
            disable=not progress,
            mininterval=0.1 if sys.stderr.isatty() else 20,
        ) as bar:

            def tell(number: int) -> None:
                bar.total = max(bar.total, bar.n + 1)
                bar.set_postfix_str(f"{number} slots")
                bar.update()

            try:
                timed = take_turns(ways, rounds=report.rounds, device=device, before=tell, after=keep)
            finally:
                self.decoder.release()
                release([], device)
        report.failures += [self._failure(number, one.failure) for number, one in timed.items() if one.failure]
        keep(timed)

    def _fits(self, report: SlotReport, slots: int) -> bool:
        """Return True if memory holds passes of so many slots; otherwise the report gets a failure."""
        family, plan = self.decoder.family, self.decoder.plan
        try:
            memory.check_memory(family, plan, self.batch, rows=self.rows, slots=self._slots, lookahead=slots)
        except memory.BatchTooLarge as error:
            report.failures.append(self._failure(slots, Trouble.of(error)))
            return False
        return True

    @torch.inference_mode()
    def _repeat(self, slots: int, *, most: int) -> None:
        """Run the passes of a round; the first round fills the state for passes of at most `most` slots."""
        first = middle(self.decoder.plan, slots) - slots
        with inference_on(self.decoder.family.model.device):
            if not self.filled:
                self._fill(most)
            for _ in range(PASSES):
                self._pass(first, slots)

    def _fill(self, most: int) -> None:
        """Give the decoder a state for passes of at most `most` slots, with the first half of the images generated."""
        decoder, family, plan = self.decoder, self.decoder.family, self.decoder.plan
        self.sampling = self.recipe.sampling.model_copy(update={"lookahead": most})
        condition = family.check(conditions(self.recipe.model, self.batch))
        prompt, padding = prompts(family, condition, guided=self.guided)
        decoder.state = DecodeState(family, plan, self.batch, prompt, padding, slots=self._slots, lookahead=most)
        seeds = code_seeds(list(range(self.batch)), plan.grid.num_codes, seed=self.recipe.seed)
        decoder.state.begin(prompt, padding, seeds)
        decoder.run_pass(Shape(plan.prompt, decoder.keys(plan.prompt), prompt=True), self.sampling)
        for first in range(plan.prompt, middle(plan, most), most):
            self._pass(first, min(most, len(plan) - first))
        self.filled = True

    def _pass(self, first: int, slots: int) -> None:
        """Run a pass that feeds this many slots of each image from slot `first` on."""
        decoder = self.decoder
        assert decoder.state is not None
        decoder.state.slot.fill_(first)
        decoder.run_pass(Shape(slots, decoder.keys(first + slots), prompt=False), self.sampling)

    @property
    def _slots(self) -> int:
        """Number of slots of the cache."""
        return self.decoder.visible.shape[1]

    def _row(self, slots: int, timed: Timed, one_slot: float | None) -> SlotRow:
        """Return the result of a number of slots; `one_slot` is the seconds of a round with 1 slot."""
        plan, size = self.decoder.plan, self.decoder.family.model.dtype.itemsize
        floor = self.work.middle_floor(plan, self.rates, slots=slots, rows=self.rows, size=size)
        seconds = timed.middle / PASSES
        return SlotRow(
            slots=slots,
            batch=self.batch,
            keys=middle(plan, slots),
            pass_ms=seconds * 1000,
            spread=timed.spread,
            floor_ms=floor * 1000,
            times_floor=seconds / floor,
            against_one=timed.middle / one_slot if one_slot else None,
            warm_ups=timed.warm_ups,
            rounds=len(timed.times),
        )

    def _failure(self, slots: int, trouble: Trouble) -> Failure:
        """Return the failure of a number of slots."""
        grid = self.decoder.plan.grid
        return Failure(
            method=f"pass of {slots} slots",
            grid=[grid.height, grid.width],
            window=self.decoder.plan.window,
            batch=self.batch,
            error=trouble.error,
            trace=trouble.trace,
        )
