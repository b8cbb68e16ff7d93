"""The models that docs/evidence.md speaks of: trained as far as they are not, by the command line that people have."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tables import PICTURES, WINDOWS

from zipar_train.io.files import make_folder

RUNS, DATA = (Path(os.environ.get(f"ZIPAR_{name}", name.lower())) for name in ("RUNS", "DATA"))
OUT, MNIST, SEEDS = RUNS / "evidence", DATA / "mnist", [0, 1, 2]
HERE = Path(__file__).parent


def zipar(*arguments: Any, variant: dict[str, Any] | None = None) -> None:
    """Run one command, shown as a person would type it.

    Args:
        variant: Arguments of `variants.Variant`, if the command trains with another module than the product's.
    """
    if variant:
        words = json.dumps(variant)
        execute([str(HERE / "variants.py"), words], f"python scripts/evidence/variants.py '{words}'", arguments)
    else:
        execute(["-m", "zipar_train"], "zipar-train", arguments)


def script(path: str, *arguments: Any) -> None:
    """Run a script, shown as a person would type it."""
    execute([path], f"python {path}", arguments)


def execute(program: list[str], shown: str, arguments: Iterable[Any]) -> None:
    words = [str(argument) for argument in arguments]
    print(f"\n$ {shown} " + " ".join(f"'{word}'" if re.search(r"[ {}]", word) else word for word in words), flush=True)
    try:
        status = subprocess.run([sys.executable, *program, *words]).returncode
    except KeyboardInterrupt:  # the verb has heard it too, and says how to go on
        status = 130
    if status:
        sys.exit(status)


def sets(*overrides: str) -> Iterable[str]:
    return [word for override in overrides for word in ("--set", override)]


@cache
def trained(recipe: str, run: Path, *overrides: str, change: str | None = None, variant: str = "{}") -> Path:
    """Return a run folder, trained as far as it is not.

    Args:
        change: A key in which a longer run may differ from its start.
        variant: Arguments of `variants.Variant`, as JSON.
    """
    allowed = ("--allow-change", change) if change else ()
    arguments = ("fit", "--recipe", recipe, "--resume", *allowed, *sets(*overrides, f"run_dir={run}"))
    zipar(*arguments, variant=json.loads(variant))
    return run


@dataclass(frozen=True)
class Dataset:
    """Images, the recipe of an untuned model of them, and the recipe of its one epoch.

    Args:
        windows: The windows of the tables; the first is next-token.
        reported: Manifest of the images that results are reported on.
        average: Decay of averaged weights, for runs at a constant learning rate: about an epoch's steps.
        base_overrides: Overrides of the base's recipe.
        overrides: Overrides of the epoch's recipe.
    """

    name: str
    base_recipe: str
    recipe: str
    windows: tuple[int, ...]
    reported: Path
    average: float = 0.999
    base_overrides: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def base(self, seed: int, *overrides: str, name: str = "base") -> Path:
        """Return the untuned model: the export in docs/evidence, if it has the seed, so that all results share it."""
        published = PICTURES / f"{self.name}-{name}-{seed}"
        if published.is_dir():
            return published
        run = RUNS / f"{self.name}-{name}-{seed}"
        return trained(self.base_recipe, run, f"seed={seed}", *self.base_overrides, *overrides)

    def run(self, seed: int, name: str = "") -> Path:
        return RUNS / "-".join(filter(None, [self.name, name, str(seed)]))

    def tuned(self, seed: int, *overrides: str, name: str = "", start: Path | None = None, **more: Any) -> Path:
        """Return a run of the recipe, from `start` or the untuned model; `more`: see `trained`."""
        run = self.run(seed, name)
        weights = f"model.weights={start or self.base(seed)}"
        return trained(self.recipe, run, f"seed={seed}", weights, *self.overrides, *overrides, **more)

    def control(self, seed: int) -> Path:
        return self.tuned(seed, f"zipar.windows={{{self.windows[0]}: 1}}", "tune.distill=0", name="control")


DIGITS = Dataset("digits", "digits-base", "digits", (8, 4, 2, 1), DATA / "digits" / "val.json", average=0.98)
MNIST_14 = Dataset("mnist", "mnist-base", "mnist", (14, 7, 4, 3, 2, 1), MNIST / "fresh.json")


@cache
def bits_of(checkpoint: Path, *overrides: str) -> dict[int, float]:
    """Validation bits at every window, under a rule."""
    make_folder(OUT)
    file = OUT / "bits.json"
    zipar(
        "advise",
        "--recipe",
        "mnist",
        "--checkpoint",
        checkpoint,
        "--windows",
        ",".join(map(str, WINDOWS)),
        *("--tolerance", 0, "--lookahead", 32),  # few pairs to time: only bits are used
        *sets(*overrides),
        "--json",
        file,
    )
    return {row["window"]: row["bits"] for row in json.loads(file.read_text())["windows"]}


def evaluated(name: str, checkpoint: Path, *arguments: Any, recipe: str = "mnist") -> list[dict[str, Any]]:
    """Rows of an evaluation, whose images are kept."""
    make_folder(OUT)
    file = OUT / f"{name}.json"
    zipar("evaluate", "--recipe", recipe, "--checkpoint", checkpoint, *arguments, "--json", file)
    return json.loads(file.read_text())["rows"]
