"""W&B's own process (wandb-core): its settings, its files in the run folder, and its end in bounded time."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from zipar_train.recipe.schema import Recipe

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


def disabled(recipe: Recipe) -> bool:
    """Return True if the recipe or the environment turns W&B off."""
    return "disabled" in (recipe.log.wandb, os.environ.get("WANDB_MODE"))


def prepare(folder: Path) -> None:
    """Set W&B's settings in the environment, and remove what an earlier kill left in the run folder."""
    if not os.environ.get("WANDB_MODE", "set"):  # wandb rejects an empty value
        del os.environ["WANDB_MODE"]
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(STAGING, _staging(folder))
    _remove_empty(folder)


def forget(folder: Path) -> None:
    """Remove the setting of the run folder from the environment."""
    if os.environ.get(STAGING) == _staging(folder):
        del os.environ[STAGING]


def within(seconds: float | None, work: Callable[[], None]) -> bool:
    """Run work in a thread and return True if it ends in time; this thread can receive signals meanwhile."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    return not worker.is_alive()


def end_service() -> None:
    """Kill wandb-core, whatever it is waiting for; logged data is in its file."""
    import wandb

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()
    with suppress(Exception, SystemExit):  # teardown would exit this process with wandb-core's status
        wandb.teardown()  # otherwise Python waits for it at exit


def reason_of(error: Exception) -> str:
    """Return the last line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _remove_empty(run: Path) -> None:
    """Remove empty W&B runs left by an early kill, because `wandb sync` uploads nothing if one run is empty."""
    for file in (run / "wandb").glob("*run-*/*.wandb"):
        with suppress(OSError):
            found = file.stat()
            if found.st_size <= HEADER and time.time() - found.st_mtime > 2 * FLUSH:
                shutil.rmtree(file.parent)


def _staging(run: Path) -> str:
    """Return the value of `STAGING` for a run folder."""
    return str(run.absolute() / "wandb")
