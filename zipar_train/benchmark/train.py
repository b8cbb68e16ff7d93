"""Benchmark of training steps under a plan, without a teacher, compared with the plain causal step."""

from collections.abc import Callable, Sequence

import torch

from zipar_train.benchmark.random_family import on_grid
from zipar_train.benchmark.results import CAUSAL, FLEX, SDPA, TrainReport
from zipar_train.benchmark.roofline import measure
from zipar_train.benchmark.train_step import Case, TrainingStep
from zipar_train.benchmark.turns import Timed, Way, release, take_turns, turns_bar
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.run.peak_flops import peak_flops
from zipar_train.run.provenance import environment
from zipar_train.training.trainer import precision

PRECISIONS = ("bf16-mixed", "bf16-true", "32-true")  # values of trainer.precision measured on a GPU


def bench_train(
    recipe: Recipe,
    *,
    window: int,
    batches: Sequence[int],
    grids: Sequence[int] = (),
    rounds: int = 5,
    device: torch.device | str | None = None,
    progress: bool = True,
    save: Callable[[TrainReport], None] = lambda report: None,
) -> TrainReport:
    """Time training steps of a recipe's model with random weights and random codes.

    A step is the same as in `fit`, by the recipe's tune, optim and trainer sections: adapters or all weights,
    activation checkpointing, torch.compile per layer, precision, gradient norm, clipping, AdamW. It has no teacher,
    whatever tune.distill says, so the causal step differs only in the plan.

    On a CPU the step is float32, not compiled, and without FlexAttention, which has no backward pass there.

    Each kind of step is compiled for its own length and timed separately. They are not interleaved, because PyTorch
    would make the second length dynamic, which makes that kind slower.

    Args:
        recipe: The recipe.
        window: The window of the plan.
        batches: Batch sizes, in images.
        grids: Numbers of rows and columns of square grids. Empty: the recipe's own grid.
        rounds: Number of counted rounds.
        device: None: a GPU if there is one, otherwise the CPU.
        progress: Show a progress bar.
        save: Called with the report so far after every counted round.

    Raises:
        ValueError: If the window does not fit a grid, trainer.precision is not supported, or nothing was measured.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    numbers = precision(recipe) if cuda else "32-true"
    if numbers not in PRECISIONS:
        raise ValueError(f"trainer.precision = {numbers} is not measured: use {', '.join(PRECISIONS)}")
    dtype = torch.float32 if numbers == "32-true" else torch.bfloat16
    known = peak_flops(device, dtype) if cuda else None
    kinds = [CAUSAL, SDPA, FLEX] if cuda else [CAUSAL, SDPA]
    sizes = [[size, size] for size in grids] or [list(recipe.model.grid)]
    settings = [_settings(recipe, grid, window, compiled=compiles(recipe, device)) for grid in sizes]
    for each in settings:  # check before minutes of work
        Plan.zipar(each.model.raster, window=window, prompt=each.model.prompt, **each.zipar.rule)
    report = TrainReport(
        recipe=recipe.model_dump(),
        precision=numbers,
        compiled=compiles(recipe, device),
        rate=float(known or measure(device, dtype).matmul),
        rate_is="the device's data sheet" if known else "a large matrix product, measured",
        rounds=rounds,
        rows=[],
        failures=[],
        notes=_notes(recipe, compiled=compiles(recipe, device)),
        environment=environment(device),
    )
    turns = len(sizes) * len(batches) * len(kinds) * (rounds + 1)
    with turns_bar(turns, title="train", progress=progress) as bar:

        def tell(key: Case) -> None:
            bar(f"{key.grid[0]}x{key.grid[1]}, batch {key.batch}, {key.kind}")

        for each in settings:
            for batch in batches:
                causal = None
                for kind in kinds:
                    width = each.model.raster.row_length if kind == CAUSAL else window
                    step = TrainingStep(each, Case(kind, tuple(each.model.grid), width, batch), numbers, device)
                    middle = _measure(step, report, causal=causal, before=tell, save=save)
                    causal = middle if kind == CAUSAL else causal
    if not report.rows:
        raise ValueError(report.failures[0].error)
    return report


def _measure(
    step: TrainingStep,
    report: TrainReport,
    *,
    causal: float | None,
    before: Callable[[Case], None],
    save: Callable[[TrainReport], None],
) -> float | None:
    """Time a kind of step, add its row or its failure to the report, and free its memory.

    Args:
        step: The step.
        report: The report.
        causal: Seconds of the causal step.
        before: Called before each run.
        save: Called with the report so far after every counted round.

    Returns:
        The median seconds of the step; None if it failed.
    """
    rows, case, way = list(report.rows), step.case, Way(step, release=step.forget)

    def keep(timed: dict[Case, Timed]) -> None:
        one = timed[case]
        if one.times and one.failure is None:
            report.rows = [*rows, step.row(one, rate=report.rate, causal=causal)]
        save(report)

    torch.compiler.reset()
    timed = take_turns({case: way}, rounds=report.rounds, device=step.device, before=before, after=keep)[case]
    if timed.failure:
        report.rows = rows
        report.failures.append(case.failure(timed.failure))
        save(report)
    release([way], step.device)
    return None if timed.failure else timed.middle


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Return True if steps are compiled: on a GPU, if the recipe has `tune.compile`."""
    return device.type == "cuda" and recipe.tune.compile


def _settings(recipe: Recipe, grid: Sequence[int], window: int, *, compiled: bool) -> Recipe:
    """Return the recipe on a grid, for one window and without a teacher."""
    return recipe.model_copy(
        update={
            "model": on_grid(recipe.model, grid),
            "zipar": recipe.zipar.model_copy(update={"windows": {window: 1.0}}),
            "data": recipe.data.model_copy(update={"val_windows": None}),
            "tune": recipe.tune.model_copy(update={"distill": 0.0, "compile": compiled}),
        }
    )


def _notes(recipe: Recipe, *, compiled: bool) -> list[str]:
    found = []
    if recipe.tune.distill:
        found.append(f"without the teacher of tune.distill = {recipe.tune.distill:g}: fit adds its forward pass")
    if recipe.optim.ema_decay is not None:
        found.append(f"without the averaged weights of optim.ema_decay = {recipe.optim.ema_decay:g}")
    found.append(
        "a step is one batch and one update; fit takes one update for several batches where optim.global_batch_size "
        "says so"
    )
    if compiled:
        found.append("each kind of step is compiled for its own length, then timed by itself: they did not take turns")
    return found
