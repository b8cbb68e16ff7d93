"""Estimate of the device memory of a recipe, from shapes alone: a training step on tensors without data.

The estimate runs the real step under PyTorch's FakeTensorMode and counts the live bytes at each moment. It does not
include allocator overhead, device libraries, or the savings of torch.compile and FlexAttention.
"""

import weakref
from collections.abc import Iterable
from math import ceil
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from zipar_train.data.batch import Batch
from zipar_train.decoding.memory import decode_bytes
from zipar_train.io.tables import aligned
from zipar_train.models.family import Family, build, conditions
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.training.fsdp import fsdp_units
from zipar_train.training.trainer import devices, module_of, precision, weights_dtype

PARTS = ("weights", "optimizer", "average", "teacher", "gradients", "cache", "activations", "total")
GIB = 2**30


class Memory(BaseModel):
    """Memory in bytes on each device."""

    images: int  # per batch
    weights: int
    optimizer: int = 0  # optimizer state
    average: int = 0  # averaged weights
    teacher: int = 0
    gradients: int = 0  # all gradients together
    cache: int = 0  # keys and values
    activations: int  # at the end of the forward pass
    total: int  # peak; it may occur within the backward pass


class Prediction(BaseModel):
    parameters: int  # number of parameters
    trained: int  # number of trained parameters
    train: Memory
    generation: Memory

    def lines(self) -> list[str]:
        """Return a readable table, in GiB."""
        both = (self.train, self.generation)
        rows = [["", "training", "generation"], ["images at once", *(f"{memory.images:,}" for memory in both)]]
        for part in PARTS:
            sizes = [getattr(memory, part) for memory in both]
            if any(sizes):
                rows.append([part, *(f"{size / GIB:.2f}" for size in sizes)])
        counts = f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M of them trained"
        return [f"{counts}. GiB on each device:", "", *aligned(rows, "<>")]


def predict(recipe: Recipe) -> Prediction:
    """Estimate the memory of a training step at the smallest window, and of generating `evaluate.batch_size` images.

    Training takes the largest of the recipe's grids, generation takes `model.grid`.
    """
    family = build(recipe.model, device="meta", empty=True)
    parameters = sum(p.numel() for p in family.model.parameters())
    generation = generating(recipe, family)
    train, trained = training(recipe, family)
    return Prediction(parameters=parameters, trained=trained, train=train, generation=generation)


def generating(recipe: Recipe, family: Family) -> Memory:
    """Estimate the memory of generation as in evaluation on a GPU.

    Args:
        recipe: The recipe.
        family: The generator, on the meta device; its dtype is changed.
    """
    dtype = torch.float32 if recipe.evaluate.dtype == "float32" else torch.bfloat16
    family.model.to(dtype=dtype)  # type: ignore[call-arg]
    plan = Plan.zipar(
        family.grid, window=min(recipe.evaluate.windows), prompt=family.prompt_length, **recipe.zipar.rule
    )
    images = recipe.evaluate.batch_size
    rows = images * (1 if recipe.sampling.guidance == 1 else 2)
    cache, rest = (decode_bytes(family, plan, images, rows=rows, slots=slots) for slots in (len(plan), 0))
    weights = _bytes(family.model)
    return Memory(images=images, weights=weights, cache=cache - rest, activations=rest, total=weights + cache)


def training(recipe: Recipe, family: Family) -> tuple[Memory, int]:
    """Estimate the memory of a training step on the largest grid, and return it with the number of trained parameters.

    Under FSDP each device holds its shard, and the current unit unsharded with its gradients.

    Args:
        recipe: The recipe.
        family: The generator, on the meta device; it cannot be used afterwards.
    """
    tune = recipe.tune.model_copy(update={"compile": False, "attention": "sdpa"})
    recipe = recipe.model_copy(update={"tune": tune})
    dtype, kind = weights_dtype(recipe), precision(recipe)
    family.model.to(dtype=dtype)  # type: ignore[call-arg]
    apart = tune.distill and not tune.lora
    teacher = build(recipe.model, dtype=dtype, device="meta", empty=True) if apart else None
    module, images = module_of(recipe, family, teacher), recipe.data.micro_batch_size
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for each in (family, teacher):
        if each:
            _hold_nothing(each.model, fake)
    one = family.check(conditions(recipe.model, 1))
    with fake:
        condition = _repeated(one, images)
        grid = max((each.grid for each in module.plans.families.values()), key=lambda grid: grid.num_tokens)
        codes = torch.randint(family.codebook_size, (images, grid.num_codes))
        optimizer, trained = module.optimizer(), [p for p in family.model.parameters() if p.requires_grad]
        for group in optimizer.param_groups:
            group["fused"] = True  # as on a GPU
        alive = LiveBytes(trained)
        alive.add([*family.model.parameters(), *family.model.buffers()])
        weights = alive.now
        if teacher:
            alive.add([*teacher.model.parameters(), *teacher.model.buffers()])
        beside = alive.now - weights
        with alive:
            for parameter in trained:  # a first step, to allocate the optimizer state
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            state = alive.now - weights - beside
            alive.most, alive.gradients = alive.now, 0
            family.model.train()
            half = torch.float16 if kind == "16-mixed" else torch.bfloat16
            with torch.autocast("cpu", half, enabled=kind.endswith("mixed"), cache_enabled=False):  # as Lightning does
                batch = Batch(codes, condition, sides=grid.sides)
                window = min(recipe.zipar.windows)
                loss, divergence = module.losses(batch, condition, window, with_teacher=tune.distill > 0)
                loss = loss if divergence is None else loss + divergence
            activations = alive.now - weights - beside - state
            loss.backward()
            optimizer.step()
    average = weights if recipe.optim.ema_decay else 0
    gradients, total = sum(p.numel() * p.dtype.itemsize for p in trained), alive.most + average
    if recipe.trainer.get("strategy") == "fsdp":
        part, whole = 1 / devices(recipe), 2 * max(map(_bytes, fsdp_units(family.model)))
        total -= int((1 - part) * (weights + state + alive.gradients)) - whole
        weights, state, gradients = int(part * weights) + whole, int(part * state), int(part * gradients)
    return Memory(
        images=images,
        weights=weights,
        optimizer=state,
        average=average,
        teacher=beside,
        gradients=gradients,
        activations=activations,
        total=total,
    ), sum(p.numel() for p in trained)


def advice(recipe: Recipe, found: Prediction, room: float) -> list[str]:
    """Return the recipe changes that make training and generation fit into `room` bytes; empty if they fit."""
    lines = []
    train, generation = found.train, found.generation
    if train.total > room:
        kept = train.weights + train.optimizer + train.average + train.teacher
        fixed = max(train.total - train.activations, kept + train.gradients)
        images = int((room - fixed) / (train.activations / train.images))
        if 1 <= images < train.images:
            again = ceil(train.images / images)
            how = f"--set data.micro_batch_size={images}"
            if recipe.optim.global_batch_size is None:
                how += f", and --set trainer.accumulate_grad_batches={again} for the same step"
        elif not recipe.tune.activation_checkpointing:
            how = "--set tune.activation_checkpointing=true, which makes activations again in the backward pass"
        elif train.total - train.teacher <= room:
            how = "to do without the teacher, a second model: --set tune.distill=0"
        elif recipe.tune.lora is None and train.gradients + train.optimizer > 0.2 * train.total:
            how = "adapters alone: --set tune.lora={...}, which have next to no gradients and optimizer state"
        elif recipe.trainer.get("strategy") != "fsdp" and kept + train.gradients > train.activations:
            how = "to share weights among N devices: --set trainer.strategy=fsdp --set trainer.devices=N"
            how += " --set optim.ema_decay=null" if recipe.optim.ema_decay else ""
        else:
            how = "a larger device, a smaller model or grid"
        lines.append(f"Training takes {train.total / GIB:.1f} GiB of {room / GIB:.1f}. Try {how}.")
    if generation.total > room:
        images = int((room - generation.weights) / ((generation.total - generation.weights) / generation.images))
        if images >= 1:
            how = f"--set evaluate.batch_size={images}"
        elif recipe.evaluate.dtype == "float32":
            how = "--set evaluate.dtype=bfloat16"
        else:
            how = "a larger device, a smaller model or grid"
        lines.append(f"Generation takes {generation.total / GIB:.1f} GiB of {room / GIB:.1f}. Try {how}.")
    return lines


def room_here() -> float | None:
    """Return the memory of this machine's first GPU in bytes, or None without a GPU."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


class LiveBytes(TorchDispatchMode):
    """Counter of live tensor bytes: current (`now`), peak (`most`), and parameter gradients at the peak."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.parameters = list(parameters)
        self.now = self.most = self.gradients = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(tree_leaves(out))
        return out

    def add(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = None
                self.now += storage.nbytes()
                if self.now > self.most:
                    self.most = self.now
                    there = (p.grad for p in self.parameters if p.grad is not None)
                    self.gradients = sum(grad.untyped_storage().nbytes() for grad in there)
                weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.dtype.itemsize for t in (*model.parameters(), *model.buffers()))


def _repeated(condition: Any, images: int) -> Any:
    """Return the condition of one image repeated for many, as fake tensors."""
    if isinstance(condition, Tensor):
        return torch.zeros((images, *condition.shape[1:]), dtype=condition.dtype)
    return type(condition)(*(_repeated(part, images) for part in condition))


def _hold_nothing(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace a model's meta tensors by fake tensors, which take no memory but have a device to compute on."""
    with fake:
        for part in model.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    held = torch.empty(parameter.shape, dtype=parameter.dtype)
                    part._parameters[name] = nn.Parameter(held, requires_grad=parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
