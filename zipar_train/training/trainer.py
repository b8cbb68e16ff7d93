"""A recipe, run: its model, data and Lightning Trainer, put together."""

import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy

from zipar_train.data.datamodule import ShardDataModule
from zipar_train.models import lora
from zipar_train.models.compiled import compile_layers
from zipar_train.models.family import Family, build, fits
from zipar_train.models.restore import initial_weights, load_family
from zipar_train.recipe.schema import Recipe
from zipar_train.run.ranks import launched
from zipar_train.training.callbacks.average import Average
from zipar_train.training.callbacks.checkpoint import Checkpoint, EpochPrinter, Limit
from zipar_train.training.callbacks.throughput import ThroughputLogger
from zipar_train.training.csv_log import Log
from zipar_train.training.guard import Guard
from zipar_train.training.module import ZipARModule


def build_module(recipe: Recipe, *, weights: bool = True) -> ZipARModule:
    """The recipe's model, ready to train.

    Args:
        weights: load them; a checkpoint that holds them all brings its own.
    """
    model, tune = recipe.model, recipe.tune
    saved = None
    if model.weights is not None and (weights or tune.lora or tune.distill):
        saved = initial_weights(model)
    dtype = weights_dtype(recipe)
    family = load_family(model, saved, dtype=dtype) if saved else build(model, dtype=dtype)
    teacher = load_family(model, saved, dtype=dtype) if saved and tune.distill and not tune.lora else None
    module = module_of(recipe, family, teacher)
    module.base = lora.fingerprint(saved.state) if saved and (tune.lora or tune.distill) else None
    return module


def module_of(recipe: Recipe, family: Family, teacher: Family | None = None) -> ZipARModule:
    """The recipe's training of a family that has its weights."""
    tune, optim = recipe.tune, recipe.optim
    if tune.lora:
        lora.adapt(family.model, tune.lora)
    if tune.activation_checkpointing:
        with warnings.catch_warnings():  # ours to mend at transformers 6
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")
            family.model.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (family, teacher):
        if each and tune.compile:
            compile_layers(each.model.model)  # before FSDP shares the layers: its hooks run around compiled code
    return ZipARModule(
        family,
        teacher=teacher,
        distill=tune.distill,
        windows=recipe.zipar.windows,
        val_windows=recipe.val_windows,
        rule=recipe.zipar.rule,
        label_dropout=recipe.data.label_dropout,
        seed=recipe.seed,
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        weight_decay=optim.weight_decay,
        warmup=optim.warmup,
        schedule=optim.schedule,
        attention=tune.attention,
        guard=Guard(
            gradients=recipe.health.on_nonfinite, spike=recipe.health.loss_spike_factor, on_spike=recipe.health.on_spike
        ),
    )


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """Of the weights in training: float32, or what trainer.precision makes of them.

    Under adapters and bf16-mixed precision bfloat16, as large models are published and drawn from: half the memory, and
    sums between layers are rounded to it too.
    """
    kind = precision(recipe)
    if kind == "bf16-true" or (recipe.tune.lora and kind == "bf16-mixed"):
        return torch.bfloat16
    return {"16-true": torch.float16, "64-true": torch.float64}.get(kind, torch.float32)


def precision(recipe: Recipe) -> str:
    """trainer.precision by Lightning's full names."""
    kind = str(recipe.trainer.get("precision") or "32-true")
    return {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}.get(kind, kind)


def build_datamodule(recipe: Recipe, *, world: int = 1) -> ShardDataModule:
    """The recipe's shards, checked against its model, for a number of devices.

    Raises:
        ValueError: if the shards do not fit, or the devices cannot share a step.
    """
    data, model, (batch_size, accumulated) = recipe.data, recipe.model, split_batch(recipe, world)
    fitting = fits(model)  # where damage stops a run, `fit` has looked at every caption before
    return ShardDataModule(
        data.train,
        data.val,
        batch_size=batch_size,
        step=batch_size * accumulated * world,
        workers=data.workers,
        shuffle=data.shuffle,
        seed=recipe.seed,
        damaged=data.on_bad_sample,
        misfit=fitting.misfit if fitting and (data.on_bad_sample == "skip" or not fitting.fingerprint) else None,
        stalled=recipe.health.stall_warning_s,
        grid=model.raster,
        codes=model.codebook_size,
        classes=model.num_classes,
        captions=model.captions,
    )


def split_batch(recipe: Recipe, world: int) -> tuple[int, int]:
    """How a step is dealt among `world` devices: images of a batch, and batches that each device accumulates.

    Raises:
        ValueError: if it cannot be; names numbers that would do.
    """
    most, step = recipe.data.micro_batch_size, recipe.optim.global_batch_size
    if step is None:
        return most, recipe.trainer.get("accumulate_grad_batches") or 1
    if step % world:
        fewer, more = step // world * world, (step // world + 1) * world
        devices = [n for n in range(1, step + 1) if step % n == 0 and n <= 2 * world][-6:]
        raise ValueError(
            f"optim.global_batch_size = {step} images cannot be shared by {world} devices. Use {', '.join(map(str, devices))} "
            f"devices, or --set optim.global_batch_size={more}" + (f" or {fewer}" if fewer else "")
        )
    batch = max(n for n in range(1, min(most, step // world) + 1) if step // world % n == 0)
    return batch, step // world // batch


def build_trainer(
    recipe: Recipe,
    *,
    data: dict[str, str] | None = None,
    shards: dict[str, str] | None = None,
    step: int | None = None,
) -> L.Trainer:
    """Lightning's Trainer as the recipe's `trainer` section says, with a CSV log and our checkpoints.

    Args:
        data: what is trained on and held out, in words; checkpoints keep it for model cards.
        shards: checksums of the manifests by recipe key; checkpoints keep them for comparison on resuming.
        step: of the checkpoint that the run continues from.

    Raises:
        ValueError: if Lightning refuses an argument, or a step cannot be dealt among the devices; says which.
    """
    watched = sys.stderr.isatty() and recipe.trainer.get("enable_progress_bar", True)
    callbacks: list[L.Callback] = [TQDMProgressBar() if watched else EpochPrinter()]
    if recipe.optim.ema_decay is not None:
        callbacks.append(Average(decay=recipe.optim.ema_decay))
    checkpoint = Checkpoint(recipe, data=data, shards=shards, step=step)
    arguments: dict[str, Any] = {"enable_model_summary": False, **recipe.trainer}
    if (most := arguments.pop("max_time", None)) is not None:
        callbacks.append(Limit(most))
    callbacks += [ThroughputLogger(), checkpoint]  # last: it saves what the others have done
    arguments |= {"enable_checkpointing": False, "default_root_dir": recipe.run_dir, "callbacks": callbacks}
    arguments["enable_progress_bar"] = watched
    plugins: list[Any] = [checkpoint.io]
    if (environment := launched()) is not None:
        plugins.append(environment)
    try:
        if arguments.get("strategy") == "fsdp":
            arguments["strategy"] = ModelParallelStrategy(
                data_parallel_size=devices(recipe), tensor_parallel_size=1, save_distributed_checkpoint=False
            )
        trainer = L.Trainer(**arguments, plugins=plugins, logger=Log(recipe.run_dir, name="logs"))
    except Exception as error:  # of Lightning, its plugins, and packages that an accelerator asks for
        raise ValueError(f"trainer: Lightning refuses the recipe's arguments: {error}") from error
    trainer.accumulate_grad_batches = split_batch(recipe, trainer.world_size)[1]
    return trainer


def devices(recipe: Recipe) -> int:
    """That weights are shared among under FSDP, over all nodes."""
    asked = recipe.trainer["devices"]
    return (len(asked) if isinstance(asked, list) else asked) * recipe.trainer.get("num_nodes", 1)
