"""A recipe's training from start to end: its run folder claimed, what is there continued, a checkpoint left behind."""

import logging
import os
import signal
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from zipar_train.checkpoints import damage, folder, last_checkpoint, newest_first
from zipar_train.decoding.memory import ran_out
from zipar_train.files import CLAIM, claimed, make_folder, write_whole
from zipar_train.models.weights import read
from zipar_train.recipe import differences, dump
from zipar_train.sections import Recipe
from zipar_train.training.callbacks import Stopped
from zipar_train.training.resumable import Resumable, check_fits, same_shards
from zipar_train.training.tracking import tracked
from zipar_train.training.trainer import build_datamodule, build_module, build_trainer

HARMLESS = (  # keys that may differ on resuming: no loss depends on them
    *("about", "run", "checkpoint_every", "checkpoint_keep", "checkpoint_best", "draw", "evaluate", "log", "health"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary", "data.workers"),
)
SHARED = ("data.batch_size", "trainer.devices", "trainer.num_nodes")  # nor on these, where optim.batch is given
FIXED = ("model", "tune.lora")  # keys that must not: the weights would not fit


def fit(recipe: Recipe, *, resume: bool = False, allow: Sequence[str] = ()) -> Path:
    """Train a recipe into its run folder.

    Args:
        resume: continue from the folder's newest whole checkpoint if it has one.
        allow: keys in which the recipe may differ from the one that the folder was made by.

    Returns:
        The checkpoint.

    Raises:
        ValueError: for anything wrong with the recipe, its data, its weights or its run folder.
        Stopped: when a signal ended the run; the checkpoint is whole.
    """
    quiet()
    run = Path(recipe.run)
    made = [place for place in (folder(run), *folder(run).parents) if not place.exists()]
    write_folder(run)
    try:
        with claimed(folder(run)) if rank_zero_only.rank == 0 else nullcontext():  # type: ignore[attr-defined]
            return _fit(recipe, run, resume=resume, allow=allow)
    finally:
        with suppress(OSError):  # nothing is left of a run that did not begin
            if made and not newest_first(run):
                (folder(run) / CLAIM).unlink()
            for place in made:
                place.rmdir()


def _fit(recipe: Recipe, run: Path, *, resume: bool, allow: Sequence[str]) -> Path:
    if last_checkpoint(run) and not resume:
        raise ValueError(
            f"{run} already holds a run. Continue it with --resume, or write elsewhere with --set run=FOLDER"
        )
    checkpoint, step = to_continue(recipe, run, allow)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    train, val = build_datamodule(
        recipe, world=recipe.optim.batch or 1
    ).manifests  # looked at before anything is loaded
    described = {
        "trained on": f"{train.samples:,} images, {train.source} (views: {train.views})",
        "held out": f"{val.samples:,} images, {val.source}",
    }
    shards = {"data.train": train.checksum, "data.val": val.checksum}
    saved = read(checkpoint) if checkpoint else None
    if saved:
        same_shards(saved, recipe, shards, allow)
    module = build_module(recipe, weights=checkpoint is None)
    if saved:
        check_fits(saved, module)
    trainer = build_trainer(recipe, data=described, shards=shards, step=step)
    data = build_datamodule(recipe, world=trainer.world_size)
    write_recipe(run, recipe)
    parameters = sum(p.numel() for p in module.parameters()) / 1e6
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
    share = f" ({trained:.1f} M of them in adapters, which alone are trained)" if recipe.tune.lora else ""
    windows = ", ".join(f"{w} (weight {x:g})" for w, x in recipe.zipar.windows.items())
    rank_zero_print(
        f"{recipe.name}: {recipe.model.family}, {parameters:.1f} M parameters{share}, {module.family.grid} codes, "
        f"windows {windows}; {train.samples:,} images to train on, {val.samples:,} held out."
    )
    shares = [f"{trainer.world_size} devices"] * (trainer.world_size > 1) + [f"{data.batch_size} images"]
    if trainer.accumulate_grad_batches > 1:
        shares.append(f"{trainer.accumulate_grad_batches} batches")
    rank_zero_print(f"A step is {' x '.join(shares)}.")
    with tracked(trainer, recipe, resume=resume):
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise ValueError(
                f"memory ran out with {data.batch_size} images on a device at once. Lower data.batch_size: optim.batch "
                f"keeps a step what it is. `zipar-train plan --recipe {recipe.name}` tells what fits"
            ) from error
        finally:
            for logger in trainer.loggers:
                logger.save()
    if last_checkpoint(run) is None:
        raise ValueError(f"{run}: nothing was trained. It was stopped at its start, or recipe.trainer allows no step")
    return folder(run) / "last.ckpt"


def harmful(made_by: Recipe, recipe: Recipe, allow: Sequence[str] = ()) -> list[str]:
    """What keeps a recipe from continuing a run that another one made, in words."""
    harmless = HARMLESS + (SHARED if recipe.optim.batch and made_by.optim.batch else ())
    meant = [key for key in allow if not key.startswith(FIXED)]
    return differences(made_by, recipe, ignore=(*harmless, *meant))


def to_continue(recipe: Recipe, run: Path, allow: Sequence[str]) -> tuple[Path | None, int | None]:
    """The newest whole checkpoint of a run folder and its step, if it has any; says what it found.

    Raises:
        ValueError: if it was made by another recipe, or none is whole.
    """
    found, wrong = newest_first(run), {}
    for path in found:
        try:
            if told := damage(path):
                raise ValueError(f"{path} is damaged ({told})")
            saved = read(path)
            if saved.recipe is not None:
                Resumable.check(saved.extra, where=path)
        except ValueError as error:
            wrong[path] = str(error)
            rank_zero_print(f"{error}: an older one is looked for.")
            continue
        if saved.recipe is None:
            raise ValueError(f"{path} carries no recipe: it is no run of zipar-train. Choose another run folder")
        harmless = HARMLESS + (SHARED if recipe.optim.batch and saved.recipe.optim.batch else ())
        if changed := differences(
            saved.recipe, recipe, ignore=(*harmless, *(key for key in allow if not key.startswith(FIXED)))
        ):
            fixed = [words for words in changed if words.startswith(FIXED)]
            how = " ".join(f"--allow {words.partition(':')[0]}" for words in changed)
            raise ValueError(
                f"{run} was made by another recipe: {'; '.join(changed)}. Resume with the recipe it was made by, "
                + (f"say that you mean it with {how}, " if not fixed else "")
                + "or write elsewhere with --set run=FOLDER"
            )
        epoch, step = saved.extra["epoch"], saved.extra["global_step"]
        rank_zero_print(f"Resuming from {path}: step {step:,}, in epoch {epoch + 1}.")
        return path, step
    if found:
        raise ValueError(
            f"{run}: none of its checkpoints is whole. {'; '.join(wrong.values())}. Put a whole one there, or remove "
            "the folder and start again"
        )
    return None, None


def requeue(stop: Stopped) -> str:
    """Under SLURM, hand the job back to its queue when its time is over; says so, or nothing where it did not."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or stop.signum != signal.SIGUSR1 or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return ""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"Job {job} could not be requeued ({error}): submit it again"
    return f"Job {job} is requeued" if done.returncode == 0 else f"Job {job} was not requeued: {done.stderr.strip()}"


@rank_zero_only
def rank_zero_print(line: str, file: Any = None) -> None:
    print(line, file=file, flush=True)


def write_folder(run: Path) -> None:
    """Make the run folder, and see that it can be written.

    Raises:
        ValueError: if it cannot.
    """
    try:
        make_folder(folder(run))
        write_whole(folder(run) / ".tried", b"")
        (folder(run) / ".tried").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"run = {run}: cannot be written ({error}). Choose another folder with --set run=FOLDER"
        ) from error


def write_recipe(run: Path, recipe: Recipe) -> None:
    write_whole(run / "recipe.yaml", dump(recipe).encode())


def quiet() -> None:
    """Leave to Lightning the warnings that a user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*overrides the configure_model.*")  # ours does nothing without FSDP
