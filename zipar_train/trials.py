"""What a file in W&B's sweep syntax asks for: its trials, the same that `wandb sweep` would hand out for a grid.

docs.wandb.ai/guides/sweeps: `method`, `metric`, `parameters` with `value`, `values`, `min` and `max`, `distribution`;
nested `parameters`. Keys are recipe paths. What W&B's server alone reads (`program`, `command`, ...) is left to it.
"""

import itertools
from math import exp, log
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

SPREADS = {  # distribution: what it needs
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform": ("min", "max"),  # of the exponent of e
    "log_uniform_values": ("min", "max"),
    "normal": ("mu", "sigma"),
    "log_normal": ("mu", "sigma"),
}


class Sweep(NamedTuple):
    """A sweep file, checked."""

    method: Literal["grid", "random"]
    metric: str | None  # by which trials are ordered
    goal: Literal["minimize", "maximize"]
    parameters: dict[str, dict[str, Any]]  # recipe path: `distribution` and what it needs
    cap: int | None  # most trials


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ValueError: naming the file, the key, the value and the remedy.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("parameters"), dict) or not raw["parameters"]:
        raise ValueError(f"{path}: a sweep file has `parameters`, each with `values` or `min` and `max`")
    method, metric = raw.get("method", "grid"), raw.get("metric") or {}
    if method not in ("grid", "random"):
        raise ValueError(f"{path}: method = {method!r}: use grid or random here; `wandb sweep` knows more")
    if not isinstance(metric, dict) or metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise ValueError(f"{path}: metric = {metric!r}: give its name, and goal: minimize or maximize")
    cap = raw.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise ValueError(f"{path}: run_cap = {cap!r}: a whole number from 1")
    parameters = {key: _spread(key, found, method, path) for key, found in _flat(raw["parameters"], path)}
    return Sweep(method, metric.get("name"), metric.get("goal", "minimize"), parameters, cap)


def trials_of(sweep: Sweep, *, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The trials, each a value for every recipe path.

    Args:
        count: of a random sweep's trials, and the most of a grid's; None: the file's run_cap.
        seed: of a random sweep's draws.

    Raises:
        ValueError: if a random sweep has no end.
    """
    count = count or sweep.cap
    if sweep.method == "grid":
        choices = [_grid(spread) for spread in sweep.parameters.values()]
        found = [dict(zip(sweep.parameters, chosen, strict=True)) for chosen in itertools.product(*choices)]
        return found[:count]
    if count is None:
        raise ValueError("a random sweep has no end: give --count, or run_cap in its file")
    rng = np.random.default_rng(seed)
    return [{key: _draw(spread, rng) for key, spread in sweep.parameters.items()} for _ in range(count)]


def _flat(parameters: dict[str, Any], path: Path, before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, spread in parameters.items():
        name = f"{before}{key}"
        if not isinstance(spread, dict):
            raise ValueError(f"{path}: parameters.{name} = {spread!r}: write `value: {spread!r}` or `values: [...]`")
        found += _flat(spread["parameters"], path, f"{name}.") if "parameters" in spread else [(name, spread)]
    return found


def _spread(key: str, given: dict[str, Any], method: str, path: Path) -> dict[str, Any]:
    """A parameter with its distribution, inferred as W&B does where it is not said."""
    kind = given.get("distribution")
    if kind is None:
        whole = all(isinstance(given.get(end), int) for end in ("min", "max"))
        inferred = {"value": "constant", "values": "categorical", "q": "q_uniform", "mu": "normal",
                    "min": "int_uniform" if whole else "uniform"}  # fmt: skip
        kind = next((inferred[part] for part in inferred if part in given), None)
    if kind not in SPREADS:
        raise ValueError(
            f"{path}: parameters.{key}: distribution {kind!r} is unknown here. Known: {', '.join(SPREADS)}"
        )
    if missing := [part for part in SPREADS[kind] if part not in given]:
        raise ValueError(f"{path}: parameters.{key}: {kind} needs {' and '.join(missing)}")
    if kind == "categorical" and (not isinstance(given["values"], list) or not given["values"]):
        raise ValueError(f"{path}: parameters.{key}: values = {given['values']!r}: a list of at least one")
    for part in set(SPREADS[kind]) - {"value", "values"}:
        if not isinstance(given[part], int | float) or isinstance(given[part], bool):
            raise ValueError(
                f"{path}: parameters.{key}: {part} = {given[part]!r} is no number (write 1.0e-4, not 1e-4)"
            )
    if "min" in SPREADS[kind] and not given["min"] < given["max"]:
        raise ValueError(f"{path}: parameters.{key}: min {given['min']} is not below max {given['max']}")
    if kind == "log_uniform_values" and given["min"] <= 0:
        raise ValueError(f"{path}: parameters.{key}: min {given['min']} has no logarithm")
    if method == "grid" and kind not in ("constant", "categorical", "int_uniform", "q_uniform"):
        raise ValueError(f"{path}: parameters.{key}: a grid needs values, not {kind}. Use method: random, or values")
    return {**given, "distribution": kind}


def _grid(spread: dict[str, Any]) -> list[Any]:
    match spread["distribution"]:
        case "constant":
            return [spread["value"]]
        case "categorical":
            return list(spread["values"])
        case "int_uniform":
            return list(range(spread["min"], spread["max"] + 1))
    return np.arange(spread["min"], spread["max"], spread["q"]).tolist()


def _draw(spread: dict[str, Any], rng: np.random.Generator) -> Any:
    low, high = spread.get("min", 0), spread.get("max", 1)
    match spread["distribution"]:
        case "constant":
            return spread["value"]
        case "categorical":
            return spread["values"][int(rng.choice(len(spread["values"]), p=spread.get("probabilities")))]
        case "int_uniform":
            return int(rng.integers(low, high + 1))
        case "uniform":
            return float(rng.uniform(low, high))
        case "q_uniform":
            return float(round(rng.uniform(low, high) / spread["q"]) * spread["q"])
        case "log_uniform":
            return exp(rng.uniform(low, high))
        case "log_uniform_values":
            return exp(rng.uniform(log(low), log(high)))
        case "log_normal":
            return exp(rng.normal(spread["mu"], spread["sigma"]))
    return float(rng.normal(spread["mu"], spread["sigma"]))
