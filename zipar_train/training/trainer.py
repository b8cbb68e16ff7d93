"""Construction of a recipe's training module, data module and Lightning Trainer."""

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
    """Build the training module of a recipe.

    Args:
        recipe: The recipe.
        weights: Load the initial weights. False if a checkpoint with all weights is loaded afterwards.
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
    """Build the training module of a recipe around a family that has its weights."""
    tune, optim = recipe.tune, recipe.optim
    if tune.lora:
        lora.adapt(family.model, tune.lora)
    if tune.activation_checkpointing:
        with warnings.catch_warnings():  # deprecated; to be replaced for transformers 6
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")
            family.model.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (family, teacher):
        if each and tune.compile:
            compile_layers(each.model.model)  # before FSDP shards the layers: its hooks run around compiled code
    return ZipARModule(
        family,
        teacher=teacher,
        distill=tune.distill,
        windows=recipe.zipar.windows,
        val_windows=recipe.val_windows,
        rule=recipe.zipar.rule,
        other_grids=recipe.model.other_grids,
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
    """Return the dtype of the weights in training: float32, or as `trainer.precision` demands.

    With adapters and bf16-mixed precision the weights are bfloat16, as large models are published and used. This halves
    their memory; the residual stream is rounded to bfloat16 too.
    """
    kind = precision(recipe)
    if kind == "bf16-true" or (recipe.tune.lora and kind == "bf16-mixed"):
        return torch.bfloat16
    return {"16-true": torch.float16, "64-true": torch.float64}.get(kind, torch.float32)


def precision(recipe: Recipe) -> str:
    """Return `trainer.precision` as Lightning's full name, for example "bf16-mixed"."""
    kind = str(recipe.trainer.get("precision") or "32-true")
    return {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}.get(kind, kind)


def build_datamodule(recipe: Recipe, *, world: int = 1) -> ShardDataModule:
    """Build the data module of a recipe for `world` devices, with its shards checked against its model.

    Raises:
        ValueError: If the shards do not fit, or a step cannot be split among the devices.
    """
    data, model, (batch_size, accumulated) = recipe.data, recipe.model, split_batch(recipe, world)
    fitting = fits(model)  # with data.on_bad_sample = stop, `fit` has checked every caption before
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
        grids=model.rasters,
        codes=model.codebook_size,
        classes=model.num_classes,
        captions=model.captions,
    )


def split_batch(recipe: Recipe, world: int) -> tuple[int, int]:
    """Split a step among `world` devices: return images per batch and batches that each device accumulates.

    Raises:
        ValueError: If the step cannot be split evenly; names numbers that work.
    """
    most, step = recipe.data.micro_batch_size, recipe.optim.global_batch_size
    if step is None:
        return most, recipe.trainer.get("accumulate_grad_batches") or 1
    if step % world:
        fewer, more = step // world * world, (step // world + 1) * world
        devices = [n for n in range(1, step + 1) if step % n == 0 and n <= 2 * world][-6:]
        raise ValueError(
            f"optim.global_batch_size = {step} images cannot be shared by {world} devices. Use "
            f"{', '.join(map(str, devices))} devices, or --set optim.global_batch_size={more}"
            + (f" or {fewer}" if fewer else "")
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
    """Build Lightning's Trainer from the recipe's `trainer` section, with the package's CSV log and checkpoints.

    Args:
        recipe: The recipe.
        data: Description of training and held-out data; checkpoints store it for model cards.
        shards: Checksums of the manifests by recipe key; checkpoints store them for comparison on resuming.
        step: Step of the checkpoint that the run continues from.

    Raises:
        ValueError: If Lightning rejects an argument, or a step cannot be split among the devices; says which.
    """
    watched = sys.stderr.isatty() and recipe.trainer.get("enable_progress_bar", True)
    callbacks: list[L.Callback] = [TQDMProgressBar() if watched else EpochPrinter()]
    if recipe.optim.ema_decay is not None:
        callbacks.append(Average(decay=recipe.optim.ema_decay))
    checkpoint = Checkpoint(recipe, data=data, shards=shards, step=step)
    arguments: dict[str, Any] = {"enable_model_summary": False, **recipe.trainer}
    if (most := arguments.pop("max_time", None)) is not None:
        callbacks.append(Limit(most))
    callbacks += [ThroughputLogger(), checkpoint]  # checkpoint last: it saves the state of the others
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
    except Exception as error:  # from Lightning, its plugins, and packages that an accelerator needs
        raise ValueError(f"trainer: Lightning refuses the recipe's arguments: {error}") from error
    trainer.accumulate_grad_batches = split_batch(recipe, trainer.world_size)[1]
    return trainer


def devices(recipe: Recipe) -> int:
    """Return the number of devices, over all nodes, that FSDP shards the weights among."""
    asked = recipe.trainer["devices"]
    return (len(asked) if isinstance(asked, list) else asked) * recipe.trainer.get("num_nodes", 1)
