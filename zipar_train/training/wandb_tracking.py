"""W&B logging: one W&B run per run folder, across resumes.

Of several training processes, only the first has a W&B run.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from zipar_train.io.files import write_atomic
from zipar_train.plan.table import Plan
from zipar_train.recipe.model import Model
from zipar_train.recipe.schema import Recipe
from zipar_train.run.checkpoints import last_checkpoint
from zipar_train.run.provenance import environment
from zipar_train.run.signals import Stopped
from zipar_train.training.callbacks.samples import Samples
from zipar_train.training.wandb_run import FINISHING, Run
from zipar_train.training.wandb_service import disabled, end_service, prepare, reason_of

STOPPING = 20  # seconds after a signal or a failure: clusters do not wait for long
UPLOAD = 10e6  # bytes per second assumed for artifacts, to extend that time


@contextmanager
def tracked(trainer: L.Trainer, recipe: Recipe, *, resume: bool = False) -> Iterator[None]:
    """Log to W&B whatever the trainer logs within the `with` block, by the recipe's `log` section.

    Args:
        trainer: The trainer; a logger and callbacks are added.
        recipe: The recipe of the run.
        resume: Continue the W&B run of the run folder.

    Raises:
        ValueError: If wandb is not installed.
    """
    run = None
    if trainer.is_global_zero:
        made = environment(trainer.strategy.root_device) | {"processes": str(trainer.world_size)}
        run = start(recipe, "fit", id=_id(recipe, resume=resume), config={"environment": made})
    if run is None:
        yield
        return
    trainer.loggers = [*trainer.loggers, run]
    if recipe.log.images:
        samples = Samples(
            run.show,
            images=recipe.log.images,
            window=min(recipe.zipar.windows),
            rule=recipe.zipar.rule,
            sampling=recipe.sampling,
            classes=recipe.model.num_classes,
            batch_size=min(recipe.data.micro_batch_size, recipe.evaluate.batch_size),
        )
        trainer.callbacks.insert(0, samples)  # type: ignore[attr-defined]  # first: see `Samples`
    widest = recipe.model.raster.row_length
    windows = [*recipe.zipar.windows, *(recipe.data.val_windows or ()), widest]
    passes = passes_by_window(recipe.model, recipe.zipar.rule, windows)
    status, seconds, last = 1, float(STOPPING), {}
    try:
        with suppress(Exception):  # the first table needs W&B's server; later ones reuse its answer
            run.table("passes", ["window", "passes"], [list(item) for item in passes.items()])
        yield
        status, seconds, last["tables"] = 0, FINISHING, partial(run.tables, passes)
    except Stopped as stop:
        status = 128 + stop.signum
        raise
    finally:
        checkpoint = last_checkpoint(Path(recipe.run_dir))
        if recipe.log.artifacts and checkpoint and status != 1:
            last["artifact"] = partial(run.keep, checkpoint, recipe.name)
            seconds += 0 if status else checkpoint.stat().st_size / UPLOAD
        run.finish(status=status, seconds=seconds, last=last)


def start(recipe: Recipe, job: str, *, id: str | None = None, config: Mapping[str, Any] | None = None) -> Run | None:
    """Start a W&B run with its files in the run folder; the caller finishes it. Return None if W&B is disabled.

    If the server is unreachable, the run is offline; if W&B does not start, the result is None. Both print a message.

    Args:
        recipe: The recipe of the run.
        job: Job type, for example "fit".
        id: Id of a W&B run to continue.
        config: Configuration to log beside the recipe.

    Raises:
        ValueError: If wandb is not installed.
    """
    if disabled(recipe):
        return None
    prepare(Path(recipe.run_dir))
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            f"log.wandb = {recipe.log.wandb}: wandb is not installed. pip install wandb, or --set log.wandb=disabled"
        ) from error
    arguments, folder = _arguments(recipe, job, id, config or {}), Path(recipe.run_dir)
    if recipe.log.wandb == "online":
        try:
            return Run(wandb.init(mode=None if "WANDB_MODE" in os.environ else "online", **arguments), folder)
        except Exception as error:
            print(f"W&B is out of reach ({reason_of(error)}); the run continues offline.", flush=True)
            end_service()
    try:
        run = Run(wandb.init(mode="offline", **arguments), folder)
    except Exception as error:
        print(f"W&B does not start ({reason_of(error)}); the run continues without W&B.", flush=True)
        end_service()
        return None
    print(f"W&B offline: `wandb sync {recipe.run_dir}/wandb/offline-run-*` uploads it.", flush=True)
    return run


def _arguments(recipe: Recipe, job: str, id: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `wandb.init`; W&B names an agent's runs itself."""
    log, agent = recipe.log, "WANDB_SWEEP_ID" in os.environ
    return {
        "id": None if agent else id,
        "name": None if agent else log.name or f"{recipe.name}-{job}",
        "project": None if agent else log.project,
        "group": log.group or recipe.name,
        "tags": log.tags,
        "job_type": job,
        "dir": recipe.run_dir,
        "config": {**recipe.model_dump(mode="json"), **config},
        "resume": "allow",
    }


def passes_by_window(model: Model, rule: Mapping[str, Any], windows: Iterable[int]) -> dict[int, int]:
    """Return the forward passes of an image at each window, widest first.

    Args:
        model: The recipe's model section.
        rule: Arguments of `Plan.zipar` other than the window.
        windows: The windows.
    """
    return {
        window: Plan.zipar(model.raster, window=window, prompt=model.prompt, **rule).passes
        for window in sorted({*windows}, reverse=True)
    }


def _id(recipe: Recipe, *, resume: bool) -> str:
    """Return the id of the run folder's W&B run, to be resumed, or a new id."""
    file = Path(recipe.run_dir) / "wandb.json"
    found = os.environ.get("WANDB_RUN_ID")  # set by W&B's agents for each run
    if resume and not found:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(file.read_bytes())["id"])
    found = found or secrets.token_hex(4)
    if not disabled(recipe):
        write_atomic(file, json.dumps({"id": found}).encode())
    return found
