"""A recipe, run: its model, data and Lightning Trainer, put together."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zipar_train.files import make_folder, write_whole
from zipar_train.models import lora
from zipar_train.models.family import Family, build
from zipar_train.models.weights import last_checkpoint, read, restored
from zipar_train.recipe import differences, dump
from zipar_train.sections import Recipe
from zipar_train.training.callbacks import Checkpoint, Lines
from zipar_train.training.datamodule import ShardDataModule
from zipar_train.training.module import ZipARModule
from zipar_train.training.tracking import tracked


def build_module(recipe: Recipe, *, weights: bool = True) -> ZipARModule:
    """The recipe's model, ready to train.

    Args:
        weights: load them; a checkpoint that holds them all brings its own.
    """
    model, tune = recipe.model, recipe.tune
    saved = None
    if model.weights is not None and (weights or tune.lora or tune.distill):
        saved = read(model.weights, entry=model.weights_entry)
    dtype = weights_dtype(recipe)
    family = restored(model, saved, dtype=dtype) if saved else build(model, dtype=dtype)
    teacher = restored(model, saved, dtype=dtype) if saved and tune.distill else None
    module = module_of(recipe, family, teacher)
    module.base = lora.fingerprint(saved.state) if saved and (tune.lora or tune.distill) else None
    return module


def module_of(recipe: Recipe, family: Family, teacher: Family | None = None) -> ZipARModule:
    """The recipe's training of a family that has its weights."""
    tune, optim = recipe.tune, recipe.optim
    if tune.lora:
        lora.adapt(family.model, tune.lora)
    if tune.recompute:
        with warnings.catch_warnings():  # ours to mend at transformers 6
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")
            family.model.gradient_checkpointing_enable({"use_reentrant": False})
    if tune.compile:
        family.model.model.compile()  # in place: names of weights stay
    return ZipARModule(
        family,
        teacher=teacher,
        distill=tune.distill,
        windows=recipe.zipar.windows,
        val_windows=recipe.data.val_windows,
        stand_in=recipe.zipar.stand_in,
        label_dropout=recipe.data.label_dropout,
        seed=recipe.seed,
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        weight_decay=optim.weight_decay,
        warmup=optim.warmup,
        schedule=optim.schedule,
        attention=tune.attention,
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


def build_datamodule(recipe: Recipe) -> ShardDataModule:
    """The recipe's shards, checked against its model."""
    data, model = recipe.data, recipe.model
    return ShardDataModule(
        data.train,
        data.val,
        batch_size=data.batch_size,
        workers=data.workers,
        shuffle=data.shuffle,
        seed=recipe.seed,
        grid=model.raster,
        codes=model.codes,
        classes=model.classes,
        captions=model.captions,
    )


def build_trainer(recipe: Recipe, *, data: dict[str, str] | None = None) -> L.Trainer:
    """Lightning's Trainer as the recipe's `trainer` section says, with a CSV log and our checkpoints.

    Args:
        data: what is trained on and held out, in words; checkpoints keep it for model cards.

    Raises:
        ValueError: if Lightning refuses an argument; says which.
    """
    watched = sys.stderr.isatty() and recipe.trainer.get("enable_progress_bar", True)
    callbacks: list[L.Callback] = [TQDMProgressBar() if watched else Lines()]
    if recipe.optim.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=recipe.optim.ema))
    callbacks.append(
        Checkpoint(recipe, every=recipe.checkpoint_every, data=data)
    )  # last: it saves what the others have done
    arguments: dict[str, Any] = {"enable_model_summary": False, **recipe.trainer}
    arguments |= {"enable_checkpointing": False, "default_root_dir": recipe.run, "callbacks": callbacks}
    arguments["enable_progress_bar"] = watched
    if arguments.get("strategy") == "fsdp":
        arguments["strategy"] = ModelParallelStrategy(
            data_parallel_size=devices(recipe), tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    try:
        return L.Trainer(**arguments, logger=CSVLogger(recipe.run, name="logs"))
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: Lightning refuses the recipe's arguments {recipe.trainer}: {error}") from error


def devices(recipe: Recipe) -> int:
    """That weights are shared among under FSDP, over all nodes."""
    asked = recipe.trainer["devices"]
    return (len(asked) if isinstance(asked, list) else asked) * recipe.trainer.get("num_nodes", 1)


HARMLESS = (  # keys that may differ on resuming: no loss depends on them
    *("about", "run", "checkpoint_every", "draw", "evaluate", "log"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
)


def fit(recipe: Recipe, *, resume: bool = False) -> Path:
    """Train a recipe into its run folder.

    Args:
        resume: continue from the folder's checkpoint if it has one.

    Returns:
        The checkpoint.

    Raises:
        ValueError: for anything wrong with the recipe, its data, its weights or its run folder.
        Stopped: when a signal ended the run; the checkpoint is whole.
    """
    quiet()
    run = Path(recipe.run)
    checkpoint = last_checkpoint(run)
    if checkpoint and not resume:
        raise ValueError(
            f"{run} already holds a run. Continue it with --resume, or write elsewhere with --set run=FOLDER"
        )
    if checkpoint:
        made_by = read(checkpoint).recipe
        if made_by is None:
            raise ValueError(f"{checkpoint} carries no recipe: it is no run of zipar-train. Choose another run folder")
        changed = differences(made_by, recipe, ignore=HARMLESS)
        if changed:
            raise ValueError(
                f"{run} was made by another recipe: {'; '.join(changed)}. "
                "Resume with the recipe it was made by, or write elsewhere with --set run=FOLDER"
            )
        rank_zero_print(f"Resuming from {checkpoint}.")
    data = build_datamodule(recipe)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    module = build_module(recipe, weights=checkpoint is None)
    learnt = {name.removeprefix("model.") for name, p in module.named_parameters() if p.requires_grad}
    if checkpoint and (missing := learnt - read(checkpoint).state.keys()):
        raise ValueError(f"{checkpoint} lacks {sorted(missing)[0]}: it is damaged, or of another version. Start again")
    train, val = data.manifests
    trainer = build_trainer(
        recipe,
        data={
            "trained on": f"{train.samples:,} images, {train.source} (views: {train.views})",
            "held out": f"{val.samples:,} images, {val.source}",
        },
    )
    write_folder(run, recipe)
    parameters = sum(p.numel() for p in module.parameters()) / 1e6
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
    share = f" ({trained:.1f} M of them in adapters, which alone are trained)" if recipe.tune.lora else ""
    windows = ", ".join(f"{w} (weight {x:g})" for w, x in recipe.zipar.windows.items())
    rank_zero_print(
        f"{recipe.name}: {recipe.model.family}, {parameters:.1f} M parameters{share}, {module.family.grid} codes, "
        f"windows {windows}; {train.samples:,} images to train on, {val.samples:,} held out."
    )
    with tracked(trainer, recipe, resume=resume):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if last_checkpoint(run) is None:
        raise ValueError(f"{run}: nothing was trained. It was stopped at its start, or recipe.trainer allows no step")
    return run / "checkpoints" / "last.ckpt"


@rank_zero_only
def rank_zero_print(line: str) -> None:
    print(line, flush=True)


def write_folder(run: Path, recipe: Recipe) -> None:
    """Make the run folder, its recipe inside.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        make_folder(run / "checkpoints")
        write_whole(run / "recipe.yaml", dump(recipe).encode())
    except OSError as error:
        raise ValueError(
            f"run = {run}: cannot be written ({error}). Choose another folder with --set run=FOLDER"
        ) from error


def quiet() -> None:
    """Leave to Lightning the warnings that a user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*overrides the configure_model.*")  # ours does nothing without FSDP
