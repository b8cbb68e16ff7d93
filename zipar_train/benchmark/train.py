"""What a training step takes under a plan, without a teacher, beside the plain causal step: tokens a second."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from pydantic import BaseModel
from torch import Tensor
from tqdm import tqdm

from zipar_train.benchmark.floor import Work, measure, wait
from zipar_train.decoding.memory import Peak
from zipar_train.environment import environment
from zipar_train.loader import Batch
from zipar_train.models.family import Family, build, conditions
from zipar_train.plan import Plan
from zipar_train.sections import Recipe
from zipar_train.training.loss import losses
from zipar_train.training.module import ZipARModule

CAUSAL, SDPA, FLEX = "causal", "sdpa", "flex_attention"


class Row(BaseModel):
    """One step: forward, backward and optimizer. Times are medians over rounds."""

    attention: str  # causal: next-token, no mask of ours | sdpa, flex_attention: under the plan
    grid: list[int]
    window: int
    slots: int  # of an image
    batch: int
    step_ms: float
    spread: float  # (slowest - fastest round) / median
    tokens_per_second: float  # codes learnt from, stand-ins not counted
    utilisation: float  # model operations a second over the device's rate
    memory: int | None  # bytes at most, beside weights and optimizer; None: on a CPU, where that is not seen
    against_causal: float | None  # codes a second over the causal step's


class Report(BaseModel):
    recipe: dict[str, Any]
    precision: str
    compiled: bool
    rate: float  # operations a second that utilisation is a share of
    rate_is: str  # where that comes from
    rounds: int
    rows: list[Row]
    environment: dict[str, str]

    def choices(self) -> dict[int, str]:
        """The faster `tune.attention` for each number of slots."""
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
) -> Report:
    """Time training steps of a recipe's model at random weights and random codes.

    On a GPU in bfloat16 autocast, with torch.compile where the recipe's tune section says so; on a CPU in float32,
    uncompiled, and without FlexAttention, which has no backward pass there.

    Raises:
        ValueError: if the window does not fit a grid.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    dtype, compiled = torch.bfloat16 if cuda else torch.float32, cuda and recipe.tune.compile
    known = get_available_flops(device, dtype) if cuda else None
    rate = float(known or measure(device, dtype).matmul)
    kinds = [CAUSAL, SDPA, FLEX] if cuda else [CAUSAL, SDPA]
    rows: list[Row] = []
    sizes = [[size, size] for size in grids] or [recipe.model.grid]
    bar = tqdm(total=len(sizes) * len(batches) * len(kinds) * (rounds + 1), desc="train", disable=not progress,
               mininterval=0.1 if sys.stderr.isatty() else 20)  # fmt: skip
    for grid in sizes:
        model = recipe.model.model_copy(update={"grid": list(grid), "tokenizer": None, "tokenizer_weights": None})
        for batch in batches:
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            memory: dict[str, int | None] = {}
            steps = {}
            for kind in kinds:
                torch.manual_seed(recipe.seed)
                family = build(model, dtype=torch.float32, device=device)
                work = Work.of(family)
                steps[kind], plan = _step(family, recipe, kind, window=window, batch=batch, compiled=compiled)
                for turn in range(rounds + 1):
                    bar.set_postfix_str(f"{family.grid}, batch {batch}, {kind}")
                    wait(device)
                    with Peak(device) as peak:
                        start = perf_counter()
                        steps[kind]()
                        wait(device)
                        times[kind].append(perf_counter() - start)
                    if turn:  # a CPU's allocator keeps what the first step took, and the process grows no more
                        memory[kind] = peak.bytes if cuda else None
                    bar.update()
                middle = median(times[kind][1:])
                rows.append(
                    Row(
                        attention=kind,
                        grid=list(grid),
                        window=plan.window,
                        slots=len(plan),
                        batch=batch,
                        step_ms=middle * 1000,
                        spread=(max(times[kind][1:]) - min(times[kind][1:])) / middle,
                        tokens_per_second=batch * plan.grid.codes / middle,
                        utilisation=3 * batch * work.forward(plan) / middle / rate,
                        memory=memory[kind],
                        against_causal=None if kind == CAUSAL else median(times[CAUSAL][1:]) / middle,
                    )
                )
                del steps[kind], family
    bar.close()
    return Report(
        recipe=recipe.model_dump(),
        precision="bf16-mixed" if cuda else "32-true",
        compiled=compiled,
        rate=rate,
        rate_is="the device's data sheet" if known else "a large matrix product, measured",
        rounds=rounds,
        rows=rows,
        environment=environment(device),
    )


def _step(
    family: Family, recipe: Recipe, kind: str, *, window: int, batch: int, compiled: bool
) -> tuple[Callable[[], None], Plan]:
    """One training step as a function, and the plan it trains."""
    device = family.model.device
    if compiled:
        family.model.base_model.compile()
    family.model.train()
    width = family.grid.row_length
    module = ZipARModule(family, windows={window: 1.0}, rule=recipe.zipar.rule,
                         attention="flex_attention" if kind == FLEX else "sdpa").to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(family.model.parameters(), lr=1e-5, fused=device.type == "cuda")
    codes = torch.randint(family.codes, (batch, family.grid.codes), device=device)
    condition = family.check(conditions(recipe.model, batch))
    data = Batch(codes, condition)

    def loss() -> Tensor:
        if kind != CAUSAL:
            return module.losses(data, condition, window)[0]
        embeddings = torch.cat([family.prompt(condition), family.embed(codes[:, :-1])], dim=1)
        hidden = family.model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return losses(family.head, hidden[:, -codes.shape[1] :], codes, size=family.codes)[0]

    def step() -> None:
        cuda = device.type == "cuda"
        narrow: AbstractContextManager = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
        with narrow:
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, module.plans[width if kind == CAUSAL else window]
