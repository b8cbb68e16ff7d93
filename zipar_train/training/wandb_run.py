"""Logger of a W&B run; training never waits for W&B or fails because of it.

W&B's own process (wandb-core) writes logged data into the run folder and uploads it from there; `wandb sync` uploads
the rest later.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from zipar_train.run.metrics_csv import validations
from zipar_train.training.wandb_service import end_service, forget, reason_of, within

FINISHING = 60  # seconds for the remaining uploads at a run's end, unless WANDB_FINISH_TIMEOUT is set
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
                f"W&B has failed ({reason_of(error)}); {self.folder / 'logs'} alone is written from here on.",
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
                    print(f"W&B has no {what} ({reason_of(error)}).", flush=True)

        def end() -> None:
            try:
                self.run.finish(exit_code=status)
            except Exception as error:
                errors.append(error)

        ended = False
        try:
            if last and not self.failed:
                within(limit / 2 if limit else None, before)
            ended = within(max(LEAST, limit - (time.monotonic() - begun)) if limit else None, end) and not errors
        finally:  # also after a signal
            if not ended:
                end_service()
            forget(self.folder)
        if not ended and not self.failed:
            reason = "did not come to its end" if self.run.offline else "has not uploaded everything"
            option = "" if self.run.offline else "--include-online "
            print(f"W&B {reason} in {limit:.0f} s: `wandb sync {option}{Path(self.run.dir).parent}` does.", flush=True)
