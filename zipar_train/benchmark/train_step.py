"""Benchmark of training steps under a plan, without a teacher, compared with the plain causal step."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from tqdm import tqdm

from zipar_train.benchmark.roofline import Work, measure
from zipar_train.benchmark.subject import on_grid, subject
from zipar_train.benchmark.turns import Failure, Timed, Trouble, Way, release, take_turns, whole_graphs
from zipar_train.data.loader import Batch
from zipar_train.models.attention import attention_kernels
from zipar_train.models.family import Family, conditions
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.run.peak_flops import peak_flops
from zipar_train.run.provenance import environment
from zipar_train.training.loss import losses
from zipar_train.training.module import ZipARModule
from zipar_train.training.optimizer import build_optimizer, clip_gradients, gradient_norm, parameters_of
from zipar_train.training.trainer import module_of, precision, weights_dtype

CAUSAL, SDPA, FLEX = "causal", "sdpa", "flex_attention"
PRECISIONS = ("bf16-mixed", "bf16-true", "32-true")  # values of trainer.precision measured on a GPU


class Row(BaseModel):
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


class Report(BaseModel):
    recipe: dict[str, Any]
    precision: str
    compiled: bool
    rate: float  # FLOP/s that utilisation refers to
    rate_is: str  # source of that rate
    rounds: int
    rows: list[Row]
    failures: list[Failure]  # cases without a row
    notes: list[str]  # remarks on the rows
    environment: dict[str, str]

    def choices(self) -> dict[int, str]:
        """Return the fastest `tune.attention` for each number of slots."""
        best: dict[int, Row] = {}
        for row in self.rows:
            if row.attention != CAUSAL and (
                row.slots not in best or row.tokens_per_second > best[row.slots].tokens_per_second
            ):
                best[row.slots] = row
        return {slots: row.attention for slots, row in best.items()}


def bench_train(
    recipe: Recipe,
    *,
    window: int,
    batches: Sequence[int],
    grids: Sequence[int] = (),
    rounds: int = 5,
    device: torch.device | str | None = None,
    progress: bool = True,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
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
    report = Report(
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
    bar = tqdm(
        total=len(sizes) * len(batches) * len(kinds) * (rounds + 1),
        desc="train",
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 20,
    )

    def tell(key: Case) -> None:
        bar.total = max(bar.total, bar.n + 1)
        bar.set_postfix_str(f"{key.grid[0]}x{key.grid[1]}, batch {key.batch}, {key.kind}")
        bar.update()

    for each in settings:
        for batch in batches:
            causal = None
            for kind in kinds:
                case = Case(
                    kind, tuple(each.model.grid), each.model.raster.row_length if kind == CAUSAL else window, batch
                )
                before, made = list(report.rows), _Made(each, case, numbers, device)

                def keep(timed: dict[Case, Timed], made: "_Made" = made, before: list[Row] = before) -> None:
                    (one,) = timed.values()
                    if one.times and one.failure is None:
                        report.rows = [*before, made.row(one, rate=report.rate, causal=causal)]  # noqa: B023
                    save(report)

                torch.compiler.reset()
                (timed,) = take_turns(
                    {case: Way(made, release=made.forget)}, rounds=rounds, device=device, before=tell, after=keep
                ).values()
                if timed.failure:
                    report.rows = before
                    report.failures.append(case.failure(timed.failure))
                    save(report)
                elif kind == CAUSAL:
                    causal = timed.middle
                release([Way(made, release=made.forget)], device)
    bar.close()
    if not report.rows:
        raise ValueError(report.failures[0].error)
    return report


class Case(NamedTuple):
    """Case to measure: a kind of step at one grid, window and batch size."""

    kind: str
    grid: tuple[int, ...]
    window: int
    batch: int

    def failure(self, trouble: Trouble) -> Failure:
        return Failure(
            method=self.kind,
            grid=list(self.grid),
            window=self.window,
            batch=self.batch,
            error=trouble.error,
            trace=trouble.trace,
        )


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


class _Made:
    """Training step as a callable; its model and optimizer are built in the first call."""

    def __init__(self, recipe: Recipe, case: Case, precision: str, device: torch.device):
        self.recipe, self.case, self.precision, self.device = recipe, case, precision, device
        self.module: ZipARModule | None = None

    def __call__(self) -> None:
        module = self.module or self._make()
        mixed = self.precision == "bf16-mixed"
        narrow: AbstractContextManager = (
            torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
            if mixed
            else nullcontext()  # as Lightning does it
        )
        with attention_kernels(self.device), whole_graphs() if self.recipe.tune.compile else nullcontext():
            with narrow:
                value = self._loss(module)
            value.backward()
        parameters = parameters_of(self.optimizer)
        trainer: Any = self.recipe.trainer
        how: Any = trainer.get("gradient_clip_algorithm") or "norm"
        clip_gradients(parameters, gradient_norm(parameters), trainer.get("gradient_clip_val"), how)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _make(self) -> ZipARModule:
        recipe, cuda = self.recipe, self.device.type == "cuda"
        family = subject(
            recipe, recipe.model.grid, dtype=weights_dtype(recipe) if cuda else torch.float32, device=self.device
        )
        self.work = Work.of(family)
        attention = FLEX if self.case.kind == FLEX else SDPA
        tune = recipe.tune.model_copy(update={"attention": attention})
        self.module = module_of(recipe.model_copy(update={"tune": tune}), family).to(self.device)
        self.module.train()
        weights = list(family.model.parameters())
        self.trained = sum(p.numel() for p in weights if p.requires_grad) / sum(p.numel() for p in weights)
        self.optimizer = build_optimizer(
            family.model,
            lr=recipe.optim.lr,
            betas=(recipe.optim.betas[0], recipe.optim.betas[1]),
            weight_decay=recipe.optim.weight_decay,
        )
        self.plan = self.module.plans[self.case.window]
        self.codes = torch.randint(family.codes, (self.case.batch, family.grid.codes), device=self.device)
        self.condition = family.check(conditions(recipe.model, self.case.batch))
        return self.module

    def _loss(self, module: ZipARModule) -> Tensor:
        family, codes = module.family, self.codes
        dropped = torch.rand(len(codes), device=self.device) < self.recipe.data.label_dropout
        condition = family.drop(self.condition, dropped)
        if self.case.kind != CAUSAL:
            return module.losses(Batch(codes, condition), condition, self.case.window)[0]
        states = causal(family, self.plan, codes, condition)
        return losses(family.head, states, codes, size=family.codes)[0]

    def row(self, timed: Timed, *, rate: float, causal: float | None) -> Row:
        """Return the result so far.

        Args:
            timed: Times of the step.
            rate: FLOP/s that utilisation refers to.
            causal: Seconds of the causal step.
        """
        plan, batch = self.plan, self.case.batch
        attention = self.work.attention * int(plan.visible().sum())
        operations = (2 + self.trained) * (self.work.forward(plan) - attention) + 3 * attention
        return Row(
            attention=self.case.kind,
            grid=list(self.case.grid),
            window=plan.window,
            slots=len(plan),
            batch=batch,
            step_ms=timed.middle * 1000,
            spread=timed.spread,
            tokens_per_second=batch * plan.grid.codes / timed.middle,
            utilisation=batch * operations / timed.middle / rate,
            memory=timed.peaks[-1] if self.device.type == "cuda" else None,
            against_causal=causal / timed.middle if causal and self.case.kind != CAUSAL else None,
            warm_ups=timed.warm_ups,
        )

    def forget(self) -> None:
        """Free the model, the optimizer and their gradients."""
        self.module = None
        self.__dict__.pop("optimizer", None)


def causal(family: Family, plan: Plan, codes: Tensor, condition: Any) -> Tensor:
    """Return the hidden states (B, N, D) that predict each code with tokens in raster order, as in pretraining.

    No mask and no positions are given, so transformers uses its own causal attention kernels. Padding is not masked.

    Args:
        family: The generator.
        plan: A next-token plan; its slots are in raster order.
        codes: int64 (B, N).
        condition: Checked conditions of B images.
    """
    source = torch.tensor(plan.source[plan.prompt :], device=codes.device)
    tokens = torch.where(source >= 0, codes.index_select(1, source.clamp(min=0)), ROW_END)
    embeddings = torch.cat([family.prompt(condition), family.embed(tokens)], dim=1)
    hidden = family.model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return hidden.index_select(1, torch.tensor(np.flatnonzero(plan.target >= 0), device=codes.device))
