"""The models that docs/evidence.md speaks of: trained as far as they are not, by the command line that people have."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tables import WINDOWS

RUNS, DATA = (Path(os.environ.get(f"ZIPAR_{name}", name.lower())) for name in ("RUNS", "DATA"))
OUT, MNIST, SEEDS = RUNS / "evidence", DATA / "mnist", [0, 1, 2]


def zipar(*arguments: Any) -> None:
    """One verb of the command line, shown as a person would type it."""
    words = [str(argument) for argument in arguments]
    print(
        "\n$ zipar-train " + " ".join(f"'{word}'" if re.search(r"[ {}]", word) else word for word in words), flush=True
    )
    try:
        status = subprocess.run([sys.executable, "-m", "zipar_train", *words]).returncode
    except KeyboardInterrupt:  # the verb has heard it too, and says how to go on
        status = 130
    if status:
        sys.exit(status)


def sets(*overrides: str) -> Iterable[str]:
    return [word for override in overrides for word in ("--set", override)]


@cache
def trained(recipe: str, run: Path, *overrides: str) -> Path:
    """A run folder, trained as far as it is not."""
    zipar("fit", "--recipe", recipe, "--resume", *sets(*overrides, f"run_dir={run}"))
    return run


def base(seed: int) -> Path:
    return trained("mnist-base", RUNS / f"mnist-base-{seed}", f"seed={seed}")


def tuned(seed: int) -> Path:
    return trained("mnist", RUNS / f"mnist-{seed}", f"seed={seed}", f"model.weights={base(seed)}")


def control(seed: int) -> Path:
    return trained(
        "mnist",
        RUNS / f"mnist-control-{seed}",
        f"seed={seed}",
        f"model.weights={base(seed)}",
        "zipar.windows={14: 1}",
        "tune.distill=0",
    )


@cache
def bits_of(checkpoint: Path, *overrides: str) -> dict[int, float]:
    """Validation bits at every window, under a rule."""
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


def evaluated(name: str, checkpoint: Path, *arguments: Any) -> list[dict[str, Any]]:
    """Rows of an evaluation, whose drawings are kept."""
    file = OUT / f"{name}.json"
    zipar("evaluate", "--recipe", "mnist", "--checkpoint", checkpoint, *arguments, "--json", file)
    return json.loads(file.read_text())["rows"]
