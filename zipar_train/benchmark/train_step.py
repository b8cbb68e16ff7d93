"""One training step of the benchmark: under a plan as in `fit`, or plain causal without a mask."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import CAUSAL, FLEX, SDPA, TrainRow
from zipar_train.benchmark.roofline import Work
from zipar_train.benchmark.turns import Failure, Timed, Trouble, whole_graphs
from zipar_train.data.batch import Batch
from zipar_train.models.attention import attention_kernels
from zipar_train.models.family import Family, conditions
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.training.loss import losses
from zipar_train.training.module import ZipARModule
from zipar_train.training.optimizer import build_optimizer, clip_gradients, gradient_norm, parameters_of
from zipar_train.training.trainer import module_of, weights_dtype


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


class TrainingStep:
    """Training step as a callable; its model and optimizer are built in the first call."""

    def __init__(self, recipe: Recipe, case: Case, precision: str, device: torch.device):
        self.recipe, self.case, self.precision, self.device = recipe, case, precision, device
        self.module: ZipARModule | None = None

    def __call__(self) -> None:
        module = self.module or self._make()
        narrow: AbstractContextManager = nullcontext()
        if self.precision == "bf16-mixed":  # as Lightning does it
            narrow = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
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
        family = random_family(
            recipe.model,
            recipe.model.grid,
            seed=recipe.seed,
            dtype=weights_dtype(recipe) if cuda else torch.float32,
            device=self.device,
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
        self.plan = self.module.plans.plan(self.case.window)
        self.codes = torch.randint(family.codebook_size, (self.case.batch, family.grid.num_codes), device=self.device)
        self.condition = family.check(conditions(recipe.model, self.case.batch))
        return self.module

    def _loss(self, module: ZipARModule) -> Tensor:
        family, codes = module.family, self.codes
        dropped = torch.rand(len(codes), device=self.device) < self.recipe.data.label_dropout
        condition = family.drop(self.condition, dropped)
        if self.case.kind != CAUSAL:
            return module.losses(Batch(codes, condition), condition, self.case.window)[0]
        states = causal(family, self.plan, codes, condition)
        return losses(family.head, states, codes, size=family.codebook_size)[0]

    def row(self, timed: Timed, *, rate: float, causal: float | None) -> TrainRow:
        """Return the result so far.

        Args:
            timed: Times of the step.
            rate: FLOP/s that utilisation refers to.
            causal: Seconds of the causal step.
        """
        plan, batch = self.plan, self.case.batch
        attention = self.work.attention * int(plan.visible().sum())
        operations = (2 + self.trained) * (self.work.forward(plan) - attention) + 3 * attention
        return TrainRow(
            attention=self.case.kind,
            grid=list(self.case.grid),
            window=plan.window,
            slots=len(plan),
            batch=batch,
            step_ms=timed.middle * 1000,
            spread=timed.spread,
            tokens_per_second=batch * plan.grid.num_codes / timed.middle,
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
