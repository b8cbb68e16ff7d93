"""Sweep files in W&B's syntax.

Syntax (docs.wandb.ai/guides/sweeps): `method`, `metric`, `parameters` with `value`, `values`, `min` and `max`,
`distribution`, and nested `parameters`. Keys are recipe keys. Entries that only W&B's server and agents read
(`program`, `command`, `early_terminate`, ...) are ignored.
"""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from zipar_train.io import safe_yaml as plain
from zipar_train.io.errors import did_you_mean, safe_repr, truncate
from zipar_train.sweep.distributions import MOST, checked

PATH = re.compile(r"\w[\w-]{0,59}(\.\w[\w-]{0,59}){0,9}", re.ASCII)  # of a recipe's key
PARAMETERS = 100  # largest number of parameters
KEYS = (
    "method",
    "metric",
    "parameters",
    "run_cap",
    "program",
    "command",
    "name",
    "project",
    "entity",
    "description",
    "early_terminate",
    "apiVersion",
    "kind",
    "controller",
    "job",
    "image_uri",
    "metrics",
    "scheduler",
)


class Sweep(NamedTuple):
    """Checked content of a sweep file."""

    method: Literal["grid", "random"]
    metric: str | None  # metric to sort trials by
    goal: Literal["minimize", "maximize"]
    parameters: dict[str, dict[str, Any]]  # recipe key: `distribution` and its entries, in W&B's order
    cap: int | None  # largest number of trials


def read_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file.

    Raises:
        ValueError: If the file is not valid; names the file, the key, the value and the remedy.
    """
    path = Path(path)
    raw = plain.read(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("parameters"), dict) or not raw["parameters"]:
        raise ValueError(f"{path}: a sweep file has `parameters`, each with `values` or `min` and `max`")
    if unknown := [key for key in raw if key not in KEYS]:
        raise ValueError(
            f"{path}: {truncate(unknown[0], length=60)} is no key of a sweep.{did_you_mean('', str(unknown[0]), KEYS)}"
        )
    method, metric = raw.get("method"), raw.get("metric") or {}
    if method not in ("grid", "random"):
        raise ValueError(f"{path}: method = {safe_repr(method)}: use grid or random here; `wandb sweep` knows more")
    named = metric.get("name") if isinstance(metric, dict) else 0
    if not isinstance(named, str | None) or metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise ValueError(f"{path}: metric = {safe_repr(metric)}: give its name, and goal: minimize or maximize")
    cap = raw.get("run_cap")
    if cap is not None and not (type(cap) is int and 1 <= cap <= MOST):
        raise ValueError(f"{path}: run_cap = {safe_repr(cap)}: a whole number from 1 to {MOST:,}")
    parameters: dict[str, dict[str, Any]] = {}
    for key, found in _flat(raw["parameters"], path):
        if key in parameters:
            raise ValueError(f"{path}: parameters.{key} is there twice, by itself and nested. Drop one")
        parameters[key] = checked(found, method, where=f"{path}: parameters.{key}")
    if len(parameters) > PARAMETERS:
        raise ValueError(f"{path}: {len(parameters)} parameters: give at most {PARAMETERS}")
    return Sweep(method, named, metric.get("goal", "minimize"), parameters, cap)


def _flat(parameters: dict[str, Any], path: Path, before: str = "") -> list[tuple[str, Any]]:
    """Flatten nested parameters to (recipe key, entries) pairs, sorted at each level in W&B's order."""
    found: list[tuple[str, Any]] = []
    for key, spread in sorted(parameters.items(), key=lambda item: str(item[0])):
        name = f"{before}{truncate(key, length=60)}"
        if not isinstance(key, str) or not PATH.fullmatch(key):
            raise ValueError(f"{path}: parameters.{name}: no path of a recipe's key, such as optim.lr")
        if not isinstance(spread, dict):
            said = safe_repr(spread)
            raise ValueError(f"{path}: parameters.{name} = {said}: write `value: {said}` or `values: [...]`")
        if "parameters" not in spread:
            found.append((name, spread))
        elif len(spread) > 1 or not isinstance(spread["parameters"], dict) or not spread["parameters"]:
            raise ValueError(f"{path}: parameters.{name} has `parameters`: give it some, and nothing beside them")
        else:
            found += _flat(spread["parameters"], path, f"{name}.")
    return found
