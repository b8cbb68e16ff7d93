"""A sweep, run here without a server: each trial a `fit` in a process and a folder of its own, kept when it is done."""

import csv
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tqdm import tqdm

from zipar_train.files import make_folder, write_whole
from zipar_train.plan import Plan
from zipar_train.recipe import dump, load_recipe
from zipar_train.sections import Recipe
from zipar_train.trials import Sweep, read_sweep, trials_of

PROGRAM = "from zipar_train.cli import main; main()"


class Trial(BaseModel):
    number: int
    values: dict[str, Any]  # recipe path: value
    seconds: float  # of its last run, if it was killed before
    metrics: dict[str, float]  # of the last validation


class Outcome(BaseModel):
    """Of the trials that have ended well, the best first."""

    sweep: str  # the file's name
    metric: str
    goal: str
    trials: list[Trial]
    failed: list[str]  # in words
    passes: dict[int, int]  # window: passes of an image

    def lines(self) -> list[str]:
        """A table for people."""
        keys = sorted({key for trial in self.trials for key in trial.values})
        names = sorted({name for trial in self.trials for name in trial.metrics}, key=lambda n: (n != self.metric, n))
        head = ["trial", *keys, *names, "minutes"]
        rows = [
            [f"{t.number:03d}", *(str(t.values.get(key, "")) for key in keys),
             *(f"{t.metrics[name]:.4f}" if name in t.metrics else "" for name in names), f"{t.seconds / 60:.1f}"]
            for t in self.trials
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]


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
) -> tuple[Outcome, Path]:
    """Run what is not done yet of a sweep, and gather all of it.

    Args:
        recipe: name or path.
        file: in W&B's sweep syntax, see `trials`.
        out: the sweep's folder, a folder a trial inside; None: beside the recipe's run.
        overrides: of the recipe, for all trials.
        count, seed: see `trials.trials_of`.
        jobs: trials at once.
        gpus: numbers or ids of GPUs, a trial on each at once, instead of `jobs`.

    Returns:
        The outcome, and the folder.

    Raises:
        ValueError: for a file or recipe with mistakes, before anything is run; or a folder of another sweep.
    """
    sweep, base = read_sweep(file), load_recipe(recipe, overrides)
    folder = Path(out or f"{base.run}-{Path(file).stem}")
    found = trials_of(sweep, count=count, seed=seed)
    commands = []
    for number, values in enumerate(found):
        own = [*overrides, *map(_override, values.items()), f"run={_name(folder, number)}", f"log.group={folder.name}"]
        load_recipe(recipe, own)  # mistakes show before anything is run
        commands.append(["fit", "--recipe", recipe, *(part for o in own for part in ("--set", o)), "--resume"])
    _claim(folder, {"recipe": dump(base), "trials": found})

    slots: queue.Queue[str | None] = queue.Queue()
    for slot in list(gpus) or jobs * [None]:  # type: ignore[list-item]
        slots.put(slot)
    failed: list[str] = []
    waiting = [number for number in range(len(found)) if not (_name(folder, number) / "result.json").is_file()]
    bar = tqdm(total=len(found), initial=len(found) - len(waiting), desc="trials", disable=not progress,
               mininterval=0.1 if sys.stderr.isatty() else 20)  # fmt: skip

    def work(number: int) -> None:
        slot = slots.get()
        try:
            _one(_name(folder, number), commands[number], number, found[number], slot)
        except ValueError as error:
            failed.append(str(error))
        finally:
            slots.put(slot)
            bar.update()

    with ThreadPoolExecutor(slots.qsize()) as pool:
        try:
            list(pool.map(work, waiting))
        except KeyboardInterrupt:  # which the trials have heard too, and keep a checkpoint
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()
    return _gathered(folder, sweep, base, Path(file).name, failed), folder


def _one(place: Path, command: list[str], number: int, values: dict[str, Any], gpu: str | None) -> None:
    """Run a trial to its end.

    Raises:
        ValueError: if it fails, or has nothing to show; names its log.
    """
    make_folder(place)
    start = time.monotonic()
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
    with (place / "log.txt").open("ab") as log:
        done = subprocess.run([sys.executable, "-c", PROGRAM, *command], stdout=log, stderr=log, env=environment)
    if done.returncode:
        last = (place / "log.txt").read_text(errors="replace").strip().split("\n")[-1]
        raise ValueError(f"trial {number:03d} ended with status {done.returncode}: {last}. See {place / 'log.txt'}")
    metrics = validated(place)
    if not metrics:
        raise ValueError(f"trial {number:03d} was never validated: nothing to compare. See {place / 'log.txt'}")
    trial = Trial(number=number, values=values, seconds=time.monotonic() - start, metrics=metrics)
    write_whole(place / "result.json", trial.model_dump_json(indent=1).encode())


def validated(run: Path) -> dict[str, float]:
    """The numbers of a run folder's last validation."""
    found: dict[str, float] = {}
    logs = sorted((run / "logs").glob("version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    for file in logs:
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                found |= {name: float(text) for name, text in row.items() if name.startswith("val/") and text}
    return found


def _gathered(folder: Path, sweep: Sweep, base: Recipe, file: str, failed: list[str]) -> Outcome:
    trials = [Trial.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("[0-9]*/result.json"))]
    names = sorted({name for trial in trials for name in trial.metrics})
    metric = sweep.metric or (names[0] if names else "")
    if trials and metric not in names:
        raise ValueError(f"metric.name = {metric}: trials log {', '.join(names)}. Name one of them in {file}")
    sign = 1 if sweep.goal == "minimize" else -1
    trials.sort(key=lambda trial: sign * trial.metrics.get(metric, sign * float("inf")))
    windows = [int(name.rpartition("_w")[2]) for name in names if "_w" in name]
    passes = {
        w: Plan.zipar(base.model.raster, window=w, prompt=base.model.prompt).passes for w in sorted(windows)
    }  # fmt: skip
    return Outcome(sweep=file, metric=metric, goal=sweep.goal, trials=trials, failed=failed, passes=passes)


def draw(outcome: Outcome, path: Path) -> None:
    """Each trial's bits a code over the passes that its windows take."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for trial in outcome.trials[:12]:
        bits = {w: trial.metrics[f"val/bits_w{w}"] for w in outcome.passes if f"val/bits_w{w}" in trial.metrics}
        words = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in trial.values.items())
        axes.plot(
            [outcome.passes[w] for w in bits], list(bits.values()), marker="o", label=f"{trial.number:03d}: {words}"
        )
    axes.set(xlabel="passes an image", ylabel="bits a code, held out")
    axes.legend(fontsize=7, title=f"best {outcome.metric} first", title_fontsize=7)
    figure.savefig(path, dpi=150)


def _override(item: tuple[str, Any]) -> str:
    """As W&B's agent hands it over: texts as they are, so that `{8: 1}` is a mapping."""
    key, value = item
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _name(folder: Path, number: int) -> Path:
    return folder / f"{number:03d}"


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make the sweep's folder, or check that it holds the same trials."""
    file = folder / "sweep.json"
    make_folder(folder)
    if not file.is_file():
        write_whole(file, json.dumps(plan, indent=1).encode())
    try:
        theirs = json.loads(file.read_bytes())
    except ValueError:
        raise ValueError(f"{file} is damaged: remove the folder {folder} and start again") from None
    if theirs != json.loads(json.dumps(plan)):
        what = "trials" if theirs.get("trials") != json.loads(json.dumps(plan["trials"])) else "recipe"
        raise ValueError(f"{folder} holds a sweep of other {what}. Choose another --out, or remove it to start again")


def lines(outcome: Outcome, folder: Path) -> Iterable[str]:
    """What a person reads at the end."""
    yield from outcome.lines()
    yield ""
    yield from outcome.failed
    picture = f", the best {outcome.metric} first; {folder / 'sweep.png'}" if outcome.trials else f"; {folder}"
    yield f"{len(outcome.trials)} trials{picture}"
