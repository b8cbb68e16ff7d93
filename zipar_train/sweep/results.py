"""Results of a sweep: its trials, best first, as a table and as a plot of bits against passes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from zipar_train.io.tables import aligned
from zipar_train.recipe.schema import Recipe
from zipar_train.training.wandb_tracking import passes_by_window

BEST = 7  # number of trials plotted in colour


class Trial(BaseModel):
    number: int
    values: dict[str, Any]  # values by recipe key
    seconds: float  # duration; of the last run only, if it was resumed
    metrics: dict[str, float]  # of the last validation, without infinite values and NaN
    passes: dict[int, int] = {}  # forward passes of an image by window, for the windows in metrics

    def words(self, *keys: str) -> str:
        """Return the trial's number, and its values of the given recipe keys, as text."""
        values = ", ".join(f"{_short(key, keys)} {_formatted(self.values[key])}" for key in keys if key in self.values)
        return f"{self.number:03d}  {values}" if values else f"{self.number:03d}"

    def formatted(self, name: str) -> str:
        """Return a metric as text, or "-" if it is missing."""
        return f"{self.metrics[name]:.4f}" if name in self.metrics else "-"


class SweepResult(BaseModel):
    """Result of a sweep: its successful trials, best first, and its failures."""

    sweep: str  # name of the sweep file
    metric: str
    goal: Literal["minimize", "maximize"]
    trials: list[Trial]
    failed: list[str] = []  # error messages

    def lines(self) -> list[str]:
        """Return the lines of a table with the values that differ, the metrics, and below it the shared values."""
        keys = varied([trial.values for trial in self.trials])
        names = sorted({name for trial in self.trials for name in trial.metrics}, key=self._order)
        head = ["trial", *(_short(key, keys) for key in keys), *(_window(name) for name in names), "minutes"]
        rows = [
            [
                f"{t.number:03d}",
                *(_formatted(t.values.get(key, "")) for key in keys),
                *(t.formatted(name) for name in names),
                f"{t.seconds / 60:.1f}",
            ]
            for t in self.trials
        ]
        shared = {key: value for trial in self.trials[:1] for key, value in trial.values.items() if key not in keys}
        shared_lines = (
            [f"in all: {', '.join(f'{key} {_formatted(value)}' for key, value in shared.items())}"] if shared else []
        )
        return [*aligned([head, *rows]), *shared_lines]

    def _order(self, name: str) -> tuple[bool, bool, int]:
        """Return a sort key that puts the sweep's metric first, then the windows, widest first."""
        window = _window(name).removeprefix("w")
        return name != self.metric, not window.isdecimal(), -int(window) if window.isdecimal() else 0


def passes(recipe: Recipe, metrics: Iterable[str]) -> dict[int, int]:
    """Return the forward passes of an image at each window in a trial's metrics."""
    texts = [_window(name).removeprefix("w") for name in metrics]
    return passes_by_window(recipe.model, recipe.zipar.rule, [int(text) for text in texts if text.isdecimal()])


def gathered(folder: Path, *, file: str, metric: str, goal: Literal["minimize", "maximize"]) -> SweepResult:
    """Collect the results in a sweep's folder, best first.

    Args:
        folder: The sweep's folder.
        file: Name of the sweep file.
        metric: Metric to sort by.
        goal: "minimize" or "maximize".
    """
    files = [path for path in sorted(folder.glob("[0-9]*/result.json")) if path.is_file()]
    trials = [Trial.model_validate_json(path.read_bytes()) for path in files]
    sign = 1 if goal == "minimize" else -1
    trials.sort(key=lambda trial: sign * trial.metrics.get(metric, sign * float("inf")))
    return SweepResult(sweep=file, metric=metric, goal=goal, trials=trials)


def varied(trials: Sequence[dict[str, Any]]) -> list[str]:
    """Return the recipe keys in which trials differ, or all keys if there are no differences."""
    keys = list(dict.fromkeys(key for values in trials for key in values))
    found = [key for key in keys if any(values.get(key) != trials[0].get(key) for values in trials)]
    return found or keys


def plot(outcome: SweepResult, path: Path) -> None:
    """Plot each trial's held-out bits over the passes of its windows; the best in colour, the others in grey."""
    from zipar_train.io.figures import plt, write_figure

    keys = varied([trial.values for trial in outcome.trials])
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        shown: list[Any] = []
        for rank, trial in reversed(list(enumerate(outcome.trials))):
            x, y = list(trial.passes.values()), [trial.metrics[f"val/bits_w{window}"] for window in trial.passes]
            if rank < BEST:
                colour, label = f"C{rank}", trial.words(*keys)
                (line,) = axes.plot(x, y, "o-", ms=4, lw=2.4 if rank == 0 else 1.4, color=colour, label=label)
                shown.insert(0, line)
            else:
                axes.plot(x, y, "-", lw=0.8, color="#bbbbbb", zorder=1)
        ticks = {count: window for trial in reversed(outcome.trials) for window, count in trial.passes.items()}
        axes.set_xscale("log")
        axes.set_xticks(list(ticks), [f"{count:,}\nwindow {window}" for count, window in ticks.items()])
        axes.minorticks_off()
        heights = sorted(y for trial in outcome.trials for y in trial.metrics.values())
        if heights and heights[-1] > 2 * heights[len(heights) // 2]:  # trials that did not learn
            axes.set_ylim(top=2 * heights[len(heights) // 2])
        axes.grid(alpha=0.2)
        axes.set(
            xlabel="forward passes an image",
            ylabel="held-out bits a code (lower is better)",
            title=f"{outcome.sweep}: {len(outcome.trials)} trials",
        )
        title = f"the best {outcome.metric} first"
        axes.legend(handles=shown, title=title, fontsize=8, title_fontsize=8, frameon=False)
        write_figure(figure, path, dpi=150)


def lines(outcome: SweepResult, folder: Path) -> Iterable[str]:
    """Yield the lines printed at the end of a sweep."""
    yield from outcome.lines()
    yield ""
    yield from outcome.failed
    picture = f", the best {outcome.metric} first; {folder / 'sweep.png'}" if outcome.trials else f"; {folder}"
    yield f"{len(outcome.trials)} trials{picture}"


def _short(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a recipe key if it is unique among `keys`, otherwise the key."""
    last = key.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in keys].count(last) == 1 else key


def _formatted(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _window(name: str) -> str:
    """Return `w8` for val/bits_w8; return other metric names unchanged."""
    return name.removeprefix("val/bits_") if name.removeprefix("val/bits_w").isdecimal() else name
