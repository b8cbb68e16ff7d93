"""W&B logging: one W&B run per run folder, across resumes; training never waits for W&B or fails because of it.

W&B's own process (wandb-core) writes logged data into the run folder and uploads it from there; `wandb sync` uploads
the rest later. Of several training processes, only the first has a W&B run.
"""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import psutil
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from zipar_train.io.files import write_atomic
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe
from zipar_train.run.checkpoints import last_checkpoint
from zipar_train.run.metrics_csv import validations
from zipar_train.run.provenance import environment
from zipar_train.run.signals import Stopped
from zipar_train.training.callbacks.samples import Samples

FLUSH, HEADER = 2, 7  # seconds until W&B's file exceeds its header, and the header's bytes
DEFAULTS = {  # W&B settings; values already in the environment take precedence
    "WANDB_SILENT": "true",  # the package prints one line instead, and wandb asks no questions on a terminal
    "WANDB_INIT_TIMEOUT": "20",  # seconds until its server counts as unreachable
    "WANDB_HTTP_TIMEOUT": "10",  # seconds per request
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_ERROR_REPORTING": "false",  # offline means no network traffic
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": str(FLUSH),  # seconds; data not on disk is lost with W&B's process
}
STAGING = "WANDB_DATA_DIR"  # folder of tables for `wandb sync`: set to the run folder, by default in the home folder
FINISHING = 60  # seconds for the remaining uploads at a run's end, unless WANDB_FINISH_TIMEOUT is set
STOPPING = 20  # seconds after a signal or a failure: clusters do not wait for long
UPLOAD = 10e6  # bytes per second assumed for artifacts, to extend that time
LEAST = 3  # seconds to write everything to disk


class Run(WandbLogger):
    """Lightning logger of a started W&B run; if W&B fails, it prints one message and stops logging."""

    def __init__(self, run: Any, folder: Path):
        super().__init__(experiment=run, save_dir=str(folder))
        self.run, self.folder, self.failed = run, folder, False
        self.ask(run.define_metric, "trainer/global_step")
        self.ask(run.define_metric, "*", step_metric="trainer/global_step", step_sync=True)

    def ask(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Call a W&B function, unless W&B has failed before; its process may have died."""
        if self.failed:
            return
        try:
            work(*arguments, **options)
        except Exception as error:
            self.failed = True
            print(
                f"W&B has failed ({_reason(error)}); {self.folder / 'logs'} alone is written from here on.",
                flush=True,
            )

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.ask(super().log_metrics, metrics, step)

    def show(self, name: str, pictures: list[Image.Image], captions: list[str], step: int) -> None:
        """Log pictures, each with a caption."""
        self.ask(self.log_image, name, pictures, step, caption=captions)

    def table(self, name: str, columns: list[str | int], rows: list[list[Any]]) -> None:
        import wandb

        self.run.log({name: wandb.Table(columns, rows)})

    def tables(self, passes: Mapping[int, int]) -> None:
        """Log the run folder's held-out bits per code: a table of all validations, and a plot of the last over passes.

        Args:
            passes: Forward passes of an image at each window.
        """
        import wandb

        rows = [
            [step, window, taken, numbers[f"val/bits_w{window}"]]
            for step, numbers in validations(self.folder).items()
            for window, taken in passes.items()
            if f"val/bits_w{window}" in numbers
        ]
        if not rows:
            return
        columns: list[str | int] = ["step", "window", "passes", "bits"]
        last = wandb.Table(columns[1:], [row[1:] for row in rows if row[0] == rows[-1][0]])
        title = "held-out bits a code against passes an image"
        self.run.log(
            {
                "windows": wandb.Table(columns, rows),
                "bits against passes": wandb.plot.line(last, "passes", "bits", title=title),
            }
        )

    def keep(self, checkpoint: Path, name: str) -> None:
        """Log the current content of a checkpoint as an artifact, as a new version of the run's artifact.

        A hard link beside the W&B run's files keeps the content, as the upload may come after the file is replaced.
        """
        import wandb

        place = Path(self.run.dir).parent / checkpoint.name
        try:
            os.link(checkpoint, place)  # takes no space
        except OSError:  # a file system without links
            shutil.copyfile(checkpoint, place)
        artifact = wandb.Artifact(f"{name}-{self.run.id}", type="model")
        artifact.add_file(str(place), checkpoint.name, policy="immutable")  # no copy in the home folder
        self.run.log_artifact(artifact)

    def finish(
        self, *, status: int = 0, seconds: float = FINISHING, last: Mapping[str, Callable[[], None]] | None = None
    ) -> None:
        """Finish the run in bounded time, and print how to upload the rest.

        Args:
            status: Exit status of the process; W&B marks the run as failed unless it is 0.
            seconds: Time limit. WANDB_FINISH_TIMEOUT replaces it if set; 0 means no limit.
            last: Functions by name that log tables and artifacts first; W&B needs its server for these.
        """
        limit, begun = float(os.environ.get("WANDB_FINISH_TIMEOUT") or seconds), time.monotonic()
        errors: list[Exception] = []

        def before() -> None:
            for what, work in (last or {}).items():
                try:
                    work()
                except Exception as error:
                    print(f"W&B has no {what} ({_reason(error)}).", flush=True)

        def end() -> None:
            try:
                self.run.finish(exit_code=status)
            except Exception as error:
                errors.append(error)

        ended = False
        try:
            if last and not self.failed:
                _within(limit / 2 if limit else None, before)
            ended = _within(max(LEAST, limit - (time.monotonic() - begun)) if limit else None, end) and not errors
        finally:  # also after a signal
            if not ended:
                _end_service()
            if os.environ.get(STAGING) == _staging(self.folder):
                del os.environ[STAGING]
        if not ended and not self.failed:
            reason = "did not come to its end" if self.run.offline else "has not uploaded everything"
            option = "" if self.run.offline else "--include-online "
            print(f"W&B {reason} in {limit:.0f} s: `wandb sync {option}{Path(self.run.dir).parent}` does.", flush=True)


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
        trainer.callbacks.insert(0, Samples(recipe, run.show))  # type: ignore[attr-defined]  # first: see `Samples`
    passes = _passes(recipe)
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
    if _disabled(recipe):
        return None
    if not os.environ.get("WANDB_MODE", "set"):  # wandb rejects an empty value
        del os.environ["WANDB_MODE"]
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(STAGING, _staging(Path(recipe.run_dir)))
    _remove_empty(Path(recipe.run_dir))
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            f"log.wandb = {recipe.log.wandb}: wandb is not installed. pip install wandb, or --set log.wandb=disabled"
        ) from error
    log, agent = recipe.log, "WANDB_SWEEP_ID" in os.environ  # W&B names an agent's runs itself
    arguments: dict[str, Any] = {
        "id": None if agent else id,
        "name": None if agent else log.name or f"{recipe.name}-{job}",
        "project": None if agent else log.project,
        "group": log.group or recipe.name,
        "tags": log.tags,
        "job_type": job,
        "dir": recipe.run_dir,
        "config": {**recipe.model_dump(mode="json"), **(config or {})},
        "resume": "allow",
    }
    if log.wandb == "online":
        try:
            return Run(
                wandb.init(mode=None if "WANDB_MODE" in os.environ else "online", **arguments), Path(recipe.run_dir)
            )
        except Exception as error:
            print(f"W&B is out of reach ({_reason(error)}); it goes on offline.", flush=True)
            _end_service()
    try:
        run = Run(wandb.init(mode="offline", **arguments), Path(recipe.run_dir))
    except Exception as error:
        print(f"W&B does not start ({_reason(error)}); it goes on without.", flush=True)
        _end_service()
        return None
    print(f"W&B offline: `wandb sync {recipe.run_dir}/wandb/offline-run-*` uploads it.", flush=True)
    return run


def _passes(recipe: Recipe) -> dict[int, int]:
    """Return the forward passes of an image at each window that validation may report."""
    model, zipar = recipe.model, recipe.zipar
    windows = sorted({*zipar.windows, *(recipe.data.val_windows or ()), model.raster.row_length}, reverse=True)
    return {
        window: Plan.zipar(model.raster, window=window, prompt=model.prompt, **zipar.rule).passes for window in windows
    }


def _within(seconds: float | None, work: Callable[[], None]) -> bool:
    """Run work in a thread and return True if it ends in time; this thread can receive signals meanwhile."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    return not worker.is_alive()


def _end_service() -> None:
    """Kill wandb-core, whatever it is waiting for; logged data is in its file."""
    import wandb

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()
    with suppress(Exception, SystemExit):  # teardown would exit this process with wandb-core's status
        wandb.teardown()  # otherwise Python waits for it at exit


def _remove_empty(run: Path) -> None:
    """Remove empty W&B runs left by an early kill, because `wandb sync` uploads nothing if one run is empty."""
    for file in (run / "wandb").glob("*run-*/*.wandb"):
        with suppress(OSError):
            found = file.stat()
            if found.st_size <= HEADER and time.time() - found.st_mtime > 2 * FLUSH:
                shutil.rmtree(file.parent)


def _staging(run: Path) -> str:
    return str(run.absolute() / "wandb")


def _id(recipe: Recipe, *, resume: bool) -> str:
    """Return the id of the run folder's W&B run, to be resumed, or a new id."""
    file, found = (
        Path(recipe.run_dir) / "wandb.json",
        os.environ.get("WANDB_RUN_ID"),
    )  # set by W&B's agents for each run
    if resume and not found:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(file.read_bytes())["id"])
    found = found or secrets.token_hex(4)
    if not _disabled(recipe):
        write_atomic(file, json.dumps({"id": found}).encode())
    return found


def _disabled(recipe: Recipe) -> bool:
    return "disabled" in (recipe.log.wandb, os.environ.get("WANDB_MODE"))


def _reason(error: Exception) -> str:
    """Return the last line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
