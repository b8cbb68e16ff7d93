"""Local runner of sweeps, without a server: each trial is a `fit` in its own process and folder."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from zipar_train.io.files import folder_lock, make_folder, write_atomic
from zipar_train.recipe.load import differences, dump, load_recipe, override, parse_stored
from zipar_train.recipe.schema import Recipe
from zipar_train.run.metrics_csv import validations
from zipar_train.run.signals import Heard, noted
from zipar_train.sweep.overrides import overrides_of
from zipar_train.sweep.results import SweepResult, Trial, gathered, passes, varied
from zipar_train.sweep.spec import Sweep, read_sweep
from zipar_train.sweep.trials import trials_of


def run(
    recipe: str,
    file: str | Path,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    jobs: int = 1,
    gpus: Sequence[str] = (),
    progress: bool = True,
) -> tuple[SweepResult, Path]:
    """Run the unfinished trials of a sweep, and collect the results of all.

    Args:
        recipe: Name or path of a recipe.
        file: A file in W&B's sweep syntax, see `spec`.
        out: The sweep's folder, with a folder per trial. None: beside the recipe's run.
        overrides: Overrides of the recipe for all trials.
        count, seed: See `trials.trials_of`.
        jobs: Number of trials to run in parallel.
        gpus: Numbers or ids of GPUs, to run one trial on each in parallel, instead of `jobs`.
        progress: Show a progress bar.

    Returns:
        The result, and the folder.

    Raises:
        ValueError: If the file or a recipe has errors (before any trial is run), or the folder belongs to another sweep
            or is in use by another process.
        Stopped: If a signal was received; the trials have written checkpoints.
    """
    sweep, base = read_sweep(file), load_recipe(recipe, overrides)
    folder = Path(out or f"{base.run_dir}-{Path(file).stem}")
    found = trials_of(sweep, count=count, seed=seed)
    commands, recipes = [], []
    for number, values in enumerate(found):
        own = [
            *overrides,
            *overrides_of(values),
            override("run_dir", str(_name(folder, number))),
            override("log.group", (folder.name or base.name)[:128]),
            override("log.name", f"{base.name}-{number:03d}"),
        ]
        recipes.append(load_recipe(recipe, own))  # errors are raised before any trial is run
        commands.append(["fit", "--recipe", recipe, *(part for o in own for part in ("--set", o)), "--resume"])
    sweep = sweep._replace(metric=_metric(sweep, recipes, file))
    with folder_lock(folder):
        _begin(folder, base, found)
        failed = _run(
            folder,
            commands,
            found,
            recipes,
            metric=str(sweep.metric),
            slots=list(gpus) or jobs * [None],
            progress=progress,
        )
        outcome = gathered(folder, file=Path(file).name, metric=str(sweep.metric), goal=sweep.goal)
    return outcome.model_copy(update={"failed": sorted(failed)}), folder


def _run(
    folder: Path,
    commands: list[list[str]],
    found: list[dict[str, Any]],
    recipes: list[Recipe],
    *,
    metric: str,
    slots: Sequence[str | None],
    progress: bool,
) -> list[str]:
    """Run the trials that have no result yet.

    Args:
        folder: The sweep's folder.
        commands, found, recipes: Command line, values and recipe of each trial.
        metric: Metric shown for finished trials.
        slots: A GPU, or None, for each trial that runs in parallel.
        progress: Show a progress bar.

    Returns:
        An error message for each failed trial.

    Raises:
        Stopped: If a signal was received; the trials have written checkpoints.
    """
    free: queue.Queue[str | None] = queue.Queue()
    for slot in slots:
        free.put(slot)
    failed: list[str] = []
    waiting = [number for number in range(len(found)) if not (_name(folder, number) / "result.json").is_file()]
    bar = tqdm(
        total=len(found),
        initial=len(found) - len(waiting),
        desc="trials",
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 20,
    )

    def work(number: int) -> None:
        if running.stopped:
            return
        slot = free.get()
        try:
            trial = _one(_name(folder, number), commands[number], number, found[number], recipes[number], slot, running)
            if progress:
                words = f"trial {trial.words(*varied(found))}: {metric} {trial.formatted(metric)}"
                bar.write(words, file=sys.stderr)
        except (ValueError, OSError) as error:
            failed.append(str(error))
        finally:
            free.put(slot)
            bar.update()

    with bar, noted() as heard:  # a signal handler must not raise while the bar holds its lock
        running = Running(heard)
        with ThreadPoolExecutor(len(slots)) as pool:
            futures = [pool.submit(work, number) for number in waiting]
            while not running.stopped and wait(futures, timeout=0.2).not_done:
                pass
            if running.stopped:
                pool.shutdown(wait=False, cancel_futures=True)
                running.stop()
        heard.check()
    for future in futures:
        future.result()
    return failed


class Running:
    """Processes of the running trials; all are stopped when a signal stops the sweep."""

    def __init__(self, heard: Heard) -> None:
        self.lock, self.processes, self.heard = threading.Lock(), set[subprocess.Popen](), heard

    @property
    def stopped(self) -> bool:
        return self.heard.signum is not None

    def to_its_end(self, command: list[str], **options: Any) -> int:
        """Run a process and return its exit status, or 143 if the sweep was stopped before."""
        with self.lock:
            if self.stopped:
                return 128 + signal.SIGTERM
            process = subprocess.Popen(command, **options)
            self.processes.add(process)
        try:
            return process.wait()
        finally:
            with self.lock:
                self.processes.discard(process)

    def stop(self) -> None:
        """Send SIGTERM to each process, which finishes its step and writes a checkpoint."""
        with self.lock:
            for process in self.processes:
                process.terminate()


def _one(
    place: Path,
    command: list[str],
    number: int,
    values: dict[str, Any],
    recipe: Recipe,
    gpu: str | None,
    running: Running,
) -> Trial:
    """Run a trial to its end and return its result.

    Raises:
        ValueError: If it fails, or was never validated; names its log file.
    """
    make_folder(place)
    start = time.monotonic()
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
    with (place / "log.txt").open("ab") as log:
        status = running.to_its_end(
            [sys.executable, "-m", "zipar_train", *command], stdout=log, stderr=log, env=environment
        )
    if status:
        last = (place / "log.txt").read_text(errors="replace").strip().split("\n")[-1]
        raise ValueError(f"trial {number:03d} ended with status {status}: {last}. See {place / 'log.txt'}")
    metrics = {name: number for numbers in validations(place).values() for name, number in numbers.items()}
    if not metrics:  # a diverged trial has metrics, but they are not finite
        raise ValueError(f"trial {number:03d} was never validated: nothing to compare. See {place / 'log.txt'}")
    metrics = {name: number for name, number in metrics.items() if isfinite(number)}
    trial = Trial(
        number=number, values=values, seconds=time.monotonic() - start, metrics=metrics, passes=passes(recipe, metrics)
    )
    write_atomic(place / "result.json", trial.model_dump_json(indent=1).encode())
    return trial


def _metric(sweep: Sweep, recipes: Sequence[Recipe], file: str | Path) -> str:
    """Return the metric to compare trials by: the file's, or the bits at the smallest window that all trials report.

    Raises:
        ValueError: If not all trials report the file's metric.
    """
    choices = [recipe.data.val_windows or {*recipe.zipar.windows, recipe.model.raster.row_length} for recipe in recipes]
    shared = sorted(set.intersection(*map(set, choices)))
    names = [f"val/bits_w{window}" for window in shared]
    if sweep.metric is None and names:
        return names[0]
    if sweep.metric not in names:
        raise ValueError(
            f"{file}: metric.name = {sweep.metric}: not all trials report it; all report {', '.join(names) or 'none'}. "
            "Name one of these, or give all trials the same data.val_windows"
        )
    return sweep.metric


def _name(folder: Path, number: int) -> Path:
    return folder / f"{number:03d}"


def _begin(folder: Path, base: Recipe, trials: list[dict[str, Any]]) -> None:
    """Write the sweep's recipe and trials to its folder, or check that those in it agree; either may have more trials.

    Raises:
        ValueError: If the folder has another recipe or other trials, or its file is damaged.
    """
    file, ours = folder / "sweep.json", {"recipe": dump(base), "trials": json.loads(json.dumps(trials))}
    if file.is_file():
        try:
            theirs = json.loads(file.read_bytes())
            found, before = theirs["trials"], parse_stored(yaml.safe_load(theirs["recipe"]), where=str(file))
        except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{file} is damaged: remove the folder {folder} and start again") from error
        changed = differences(before, base, ignore=("description", "log"))
        both = min(len(found), len(trials))
        if changed or found[:both] != ours["trials"][:both]:
            what = f"another recipe ({'; '.join(changed)})" if changed else "other trials"
            raise ValueError(f"{folder} holds a sweep of {what}. Choose another --out, or remove it to start again")
        if len(found) >= len(trials):
            return
    write_atomic(file, json.dumps(ours, indent=1).encode())
