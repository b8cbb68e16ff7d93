"""Training of a recipe from start to end: locking the run folder, resuming, training, and the final checkpoint."""

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock

import lightning as L
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from zipar_train.data.validate import check_captions
from zipar_train.decoding.memory import is_oom
from zipar_train.io.files import folder_lock, make_folder, write_atomic
from zipar_train.models.restore import LoadedWeights, read
from zipar_train.recipe.load import differences, dump
from zipar_train.recipe.schema import Recipe
from zipar_train.run.checkpoints import damage, folder, last_checkpoint, newest_first
from zipar_train.run.ranks import rank_zero_print
from zipar_train.run.resume_state import ResumeState
from zipar_train.run.signals import Stopped, noted, raised
from zipar_train.training.callbacks.checkpoint import Checkpoint
from zipar_train.training.csv_log import Log
from zipar_train.training.resume_check import check_fits
from zipar_train.training.trainer import build_datamodule, build_module, build_trainer
from zipar_train.training.wandb_tracking import tracked

HARMLESS = (  # keys that may differ on resuming: the losses do not depend on them
    *("description", "run_dir", "checkpoint_every", "checkpoint_keep", "checkpoint_monitor"),
    *("sampling", "evaluate", "log", "health"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary", "data.workers"),
)
# may differ too if optim.global_batch_size is given
SHARED = ("data.micro_batch_size", "trainer.devices", "trainer.num_nodes")
MOVED = ("model.weights", "model.weights_entry")  # the weights' location, not their content
FIXED = ("model", "tune.lora")  # keys that must not differ: the weights would not fit
# A process trains one model at a time: threads share torch's generator, Lightning's patches and the locks of folders.
TRAINING = RLock()  # reentrant: a callback that trains must not wait for its own run


def fit(recipe: Recipe, *, resume: bool = False, allow: Sequence[str] = ()) -> Path | None:
    """Train a recipe into its run folder. Calls from several threads of a process run one after another.

    Args:
        recipe: The recipe to train.
        resume: Continue from the newest intact checkpoint of the run folder, if there is one.
        allow: Keys in which the recipe may differ from the one that started the run.

    Returns:
        Path of the last checkpoint; None after a trial run (`trainer.fast_dev_run`), which writes nothing.

    Raises:
        ValueError: If the recipe, its data, its weights or its run folder cannot be used.
        Stopped: If a signal ended the run; the checkpoint is complete.
    """
    silence_warnings()
    if recipe.trainer.get("fast_dev_run"):
        with alone(), TemporaryDirectory(prefix="zipar-trial-") as trial:
            log = recipe.log.model_copy(update={"wandb": "disabled"})
            _fit(recipe.model_copy(update={"run_dir": trial, "log": log}), Path(trial), resume=False, allow=())
        return None
    run = Path(recipe.run_dir)
    made = [place for place in (folder(run), *folder(run).parents) if not place.exists()]
    write_folder(run)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        with alone():
            return _fit(recipe, run, resume=resume, allow=allow)
    try:
        with alone(), folder_lock(folder(run)):
            return _fit(recipe, run, resume=resume, allow=allow)
    finally:
        with suppress(OSError):  # removes only empty folders: those of a run that did not start
            for place in made:
                place.rmdir()


@contextmanager
def alone() -> Iterator[None]:
    """Wait, with a message, until no other thread of this process trains, and keep others waiting."""
    lock = TRAINING
    if not lock.acquire(blocking=False):
        rank_zero_print("This run waits for another one in this process.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def renew_lock() -> None:
    """Replace the lock of a forked process: the thread that held it in the parent was not copied."""
    global TRAINING
    TRAINING = RLock()


os.register_at_fork(after_in_child=renew_lock)


def _fit(recipe: Recipe, run: Path, *, resume: bool, allow: Sequence[str]) -> Path:
    if last_checkpoint(run) and not resume:
        raise ValueError(
            f"{run} already holds a run. Continue it with --resume, or write elsewhere with --set run_dir=FOLDER"
        )
    checkpoint, step = to_continue(recipe, run, allow)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    train, val = build_datamodule(
        recipe, world=recipe.optim.global_batch_size or 1
    ).manifests  # checked before anything else is loaded
    if recipe.data.on_bad_sample == "stop" and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        check_captions(recipe.model, {recipe.data.train: train, recipe.data.val: val})
    described = {
        "trained on": f"{train.samples:,} images, {train.source} (views: {train.views})",
        "held out": f"{val.samples:,} images, {val.source}",
    }
    shards = {"data.train": train.checksum, "data.val": val.checksum}
    module = build_module(recipe, weights=checkpoint is None)
    if checkpoint:
        saved = read(checkpoint)
        check_shards(saved, recipe, shards, allow)
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
            with noted() if trainer.world_size > 1 else raised() as heard:  # all processes stop after the same step
                checkpoint_of(trainer).heard = heard
                trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except MisconfigurationException as error:
            raise ValueError(f"trainer: Lightning refuses the recipe's arguments: {_first_line(error)}") from error
        except SIGTERMException:  # from Lightning's own handler, if it ran before ours
            raise Stopped(signal.SIGTERM, "the last checkpoint is whole") from None
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error):
                raise
            raise ValueError(
                f"memory ran out with {data.batch_size} images on a device at once. Lower data.micro_batch_size: "
                f"optim.global_batch_size keeps a step what it is. `zipar-train plan --recipe {recipe.name}` "
                "reports what fits"
            ) from error
        finally:
            for logger in trainer.loggers:
                logger.close() if isinstance(logger, Log) else logger.save()
    how_it_ended(trainer, recipe, step)
    return folder(run) / "last.ckpt"


def check_shards(saved: LoadedWeights, recipe: Recipe, shards: dict[str, str], allow: Sequence[str]) -> None:
    """Check that a resumed run uses the shards that it was trained on.

    Args:
        saved: The checkpoint.
        recipe: The current recipe.
        shards: Current checksums of the manifests, by recipe key.
        allow: Keys whose shards may differ, or their sections.

    Raises:
        ValueError: If a manifest lists other shards than when the checkpoint was written; names the manifest.
    """
    before = saved.extra.get("shards") or {}
    for key, checksum in shards.items():
        if before.get(key, checksum) != checksum and not {key, key.partition(".")[0]} & set(allow):
            raise ValueError(
                f"{key} = {getattr(recipe.data, key.partition('.')[2])}: these are other shards than those that "
                f"{saved.path} was trained on (the manifest's checksum is {checksum[:8]}, not {before[key][:8]}). Put "
                f"the shards back, write elsewhere with --set run_dir=FOLDER, or go on with these: --allow-change {key}"
            )


def checkpoint_of(trainer: L.Trainer) -> Checkpoint:
    return next(each for each in trainer.callbacks if isinstance(each, Checkpoint))  # type: ignore[attr-defined]


def how_it_ended(trainer: L.Trainer, recipe: Recipe, begun: int | None) -> None:
    """Print why a run ended before the end of its schedule, if it did.

    Args:
        trainer: The trainer after `fit`.
        recipe: The recipe of the run.
        begun: Step that the run was resumed from, if it was.

    Raises:
        ValueError: If nothing was trained although the run is not finished.
    """
    step, epoch = trainer.global_step, trainer.current_epoch
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # in a notebook, forked processes trained
        saved = read(checkpoint_of(trainer).path).extra
        step, epoch = saved["global_step"], saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if step == (begun or 0):
        ended = step > 0 and (step == steps or epoch == epochs)
        if not ended:
            raise ValueError(
                f"{recipe.run_dir}: nothing was trained. The recipe's trainer section allows no further step: "
                f"max_steps = {steps}, max_epochs = {epochs}, limit_train_batches = {trainer.limit_train_batches}, "
                f"and step {step:,} of epoch {epoch + 1} is reached"
            )
        rank_zero_print(f"{recipe.run_dir} has already been trained to its end, step {step:,}: nothing is left to do.")
    elif trainer.should_stop:
        rank_zero_print(
            f"trainer.max_time = {recipe.trainer['max_time']} is over at step {step:,}, in epoch {epoch + 1}: the "
            "checkpoint is kept, and --resume trains for as long again."
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def blocking_changes(made_by: Recipe, recipe: Recipe, allow: Sequence[str] = ()) -> list[str]:
    """Return the differences that keep a recipe from continuing the run of another one, as text."""
    harmless = HARMLESS + (SHARED if recipe.optim.global_batch_size and made_by.optim.global_batch_size else ())
    meant = [key for key in allow if key in MOVED or not key.startswith(FIXED)]
    return differences(made_by, recipe, ignore=(*harmless, *meant))


def to_continue(recipe: Recipe, run: Path, allow: Sequence[str]) -> tuple[Path | None, int | None]:
    """Return the newest intact checkpoint of a run folder and its step, or (None, None), and print what was found.

    Raises:
        ValueError: If it belongs to another recipe, or all checkpoints are damaged.
    """
    found, wrong = newest_first(run), {}
    for path in found:
        try:
            if damaged := damage(path):
                raise ValueError(f"{path} is damaged ({damaged})")
            saved = read(path)
            if saved.recipe is not None:
                ResumeState.check(saved.extra, where=path)
        except ValueError as error:
            wrong[path] = str(error)
            rank_zero_print(f"{error}: an older one is looked for.")
            continue
        if saved.recipe is None:
            raise ValueError(f"{path} carries no recipe: it is not a run of zipar-train. Choose another run folder")
        moved = MOVED if saved.extra.get("base") else ()  # the fingerprint tells if the weights are the same
        if changed := blocking_changes(saved.recipe, recipe, (*allow, *moved)):
            fixed = [words for words in changed if words.startswith(FIXED) and words.partition(":")[0] not in MOVED]
            how = " ".join(f"--allow-change {words.partition(':')[0]}" for words in changed)
            raise ValueError(
                f"{run} was made by another recipe: {'; '.join(changed)}. Resume with the recipe it was made by, "
                + (f"say that you mean it with {how}, " if not fixed else "")
                + "or write elsewhere with --set run_dir=FOLDER"
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


def write_folder(run: Path) -> None:
    """Create the run folder and check that it can be written to.

    Raises:
        ValueError: If it cannot be created or written to.
    """
    try:
        make_folder(folder(run))
        write_atomic(folder(run) / ".tried", b"")
        (folder(run) / ".tried").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"run = {run}: cannot be written ({error}). Choose another folder with --set run_dir=FOLDER"
        ) from error


def write_recipe(run: Path, recipe: Recipe) -> None:
    write_atomic(run / "recipe.yaml", dump(recipe).encode())


def silence_warnings() -> None:
    """Silence those Lightning warnings that a user cannot act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*overrides the configure_model.*")  # it does nothing without FSDP
