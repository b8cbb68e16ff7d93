"""What a file in W&B's sweep syntax asks for: its trials, the same that `wandb sweep` would hand out for a grid.

docs.wandb.ai/guides/sweeps: `method`, `metric`, `parameters` with `value`, `values`, `min` and `max`, `distribution`;
nested `parameters`. Keys are recipe paths. What W&B's server alone reads (`program`, `command`, ...) is left to it.
"""

import re
from collections.abc import Sequence
from itertools import islice, product
from math import ceil, exp, isfinite, log, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from zipar_train import plain
from zipar_train.wording import cut, shown

MOST = 10_000  # trials, and values of a parameter of a grid
PARAMETERS = 100
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
FARTHEST = {"log_uniform": 300, "log_normal": 30}  # a number of a spread from 0, where 1e15 is too far


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
    raw = plain.read(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("parameters"), dict) or not raw["parameters"]:
        raise ValueError(f"{path}: a sweep file has `parameters`, each with `values` or `min` and `max`")
    method, metric = raw.get("method", "grid"), raw.get("metric") or {}
    if method not in ("grid", "random"):
        raise ValueError(f"{path}: method = {shown(method)}: use grid or random here; `wandb sweep` knows more")
    named = metric.get("name") if isinstance(metric, dict) else 0
    if not isinstance(named, str | None) or metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise ValueError(f"{path}: metric = {shown(metric)}: give its name, and goal: minimize or maximize")
    cap = raw.get("run_cap")
    if cap is not None and not (type(cap) is int and 1 <= cap <= MOST):
        raise ValueError(f"{path}: run_cap = {shown(cap)}: a whole number from 1 to {MOST:,}")
    parameters: dict[str, dict[str, Any]] = {}
    for key, found in _flat(raw["parameters"], path):
        if key in parameters:
            raise ValueError(f"{path}: parameters.{key} is given twice")
        parameters[key] = _spread(key, found, method, path)
    if not 1 <= len(parameters) <= PARAMETERS:
        raise ValueError(f"{path}: {len(parameters)} parameters: give at least one, and at most {PARAMETERS}")
    return Sweep(method, named, metric.get("goal", "minimize"), parameters, cap)


def trials_of(sweep: Sweep, *, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The trials, each a value for every recipe path.

    Args:
        count: of a random sweep's trials, and the most of a grid's; None: the file's run_cap.
        seed: of a random sweep's draws.

    Raises:
        ValueError: if a random sweep has no end, or there are more than `MOST` trials.
    """
    count = count or sweep.cap
    if count is not None and count > MOST:
        raise ValueError(f"--count {count}: more than {MOST:,} trials. Give a smaller one")
    if sweep.method == "grid":
        choices = [_grid(spread) for spread in sweep.parameters.values()]
        whole = prod(map(len, choices))
        if count is None and whole > MOST:
            raise ValueError(
                f"a grid of {cut(whole, length=20)} trials, more than {MOST:,}. Give fewer values, use method: random, "
                "or give --count or run_cap for the first of them"
            )
        return [dict(zip(sweep.parameters, chosen, strict=True)) for chosen in islice(product(*choices), count)]
    if count is None:
        raise ValueError("a random sweep has no end: give --count, or run_cap in its file")
    rng = np.random.default_rng(seed)
    return [{key: _draw(spread, rng) for key, spread in sweep.parameters.items()} for _ in range(count)]


def _flat(parameters: dict[Any, Any], path: Path, before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, spread in parameters.items():
        name = f"{before}{cut(key, length=60)}"
        if not isinstance(key, str) or not _PATH.fullmatch(key):
            raise ValueError(f"{path}: parameters.{name}: no path of a recipe's key, such as optim.lr")
        if not isinstance(spread, dict):
            raise ValueError(
                f"{path}: parameters.{name} = {shown(spread)}: write `value: {shown(spread)}` or `values: [...]`"
            )
        if "parameters" not in spread:
            found.append((name, spread))
        elif isinstance(spread["parameters"], dict):
            found += _flat(spread["parameters"], path, f"{name}.")
        else:
            raise ValueError(
                f"{path}: parameters.{name}.parameters = {shown(spread['parameters'])}: keys, each a spread"
            )
    return found


_PATH = re.compile(r"\w[\w-]{0,59}(\.\w[\w-]{0,59}){0,9}", re.ASCII)


def _spread(key: str, given: dict[str, Any], method: str, path: Path) -> dict[str, Any]:
    """A parameter with its distribution, inferred as W&B does where it is not said."""
    where, kind = f"{path}: parameters.{key}", given.get("distribution")
    if kind is None:
        whole = all(isinstance(given.get(end), int) for end in ("min", "max"))
        inferred = {"value": "constant", "values": "categorical", "q": "q_uniform", "mu": "normal",
                    "min": "int_uniform" if whole else "uniform"}  # fmt: skip
        kind = next((inferred[part] for part in inferred if part in given), None)
    if not isinstance(kind, str) or kind not in SPREADS:
        raise ValueError(f"{where}: distribution {shown(kind)} is unknown here. Known: {', '.join(SPREADS)}")
    if missing := [part for part in SPREADS[kind] if part not in given]:
        raise ValueError(f"{where}: {kind} needs {' and '.join(missing)}")
    if kind == "categorical" and (not isinstance(given["values"], list) or not given["values"]):
        raise ValueError(f"{where}: values = {shown(given['values'])}: a list of at least one")
    if strange := [each for part in ("value", "values") if part in given for each in _strange(given[part])]:
        raise ValueError(f"{where}: {shown(strange[0])} is no text, no finite number, nor a list or mapping of them")
    for part in set(SPREADS[kind]) - {"value", "values"}:
        _check_number(where, kind, part, given[part])
    if "min" in SPREADS[kind] and not given["min"] < given["max"]:
        raise ValueError(f"{where}: min {given['min']} is not below max {given['max']}")
    if kind == "log_uniform_values" and given["min"] <= 0:
        raise ValueError(f"{where}: min {given['min']} has no logarithm")
    if (chances := given.get("probabilities")) is not None and kind == "categorical":
        _check_chances(where, chances, len(given["values"]))
    if method == "grid":
        if kind not in ("constant", "categorical", "int_uniform", "q_uniform"):
            raise ValueError(f"{where}: a grid needs values, not {kind}. Use method: random, or values")
        if (many := _many({**given, "distribution": kind})) > MOST:
            raise ValueError(f"{where}: a grid of {many:,} values, more than {MOST:,}. Use method: random, or values")
    return {**given, "distribution": kind}


def _check_number(where: str, kind: str, part: str, value: Any) -> None:
    """A spread's number is one, and leaves the numbers drawn finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{where}: {part} = {shown(value)} is no number (write 1.0e-4, not 1e-4)")
    most = FARTHEST.get(kind, 1e15)
    if not -most <= value <= most:
        raise ValueError(f"{where}: {part} = {shown(value)}: outside {-most:g} .. {most:g}")
    if kind == "int_uniform" and not isinstance(value, int):
        raise ValueError(f"{where}: {part} = {value}: int_uniform needs a whole number")
    if (part == "q" and not value >= 1e-12) or (part == "sigma" and value < 0):
        raise ValueError(f"{where}: {part} = {value}: give a positive number")


def _check_chances(where: str, chances: Any, values: int) -> None:
    numbers = isinstance(chances, list) and all(isinstance(each, int | float) and 0 <= each <= 1 for each in chances)
    if not numbers or len(chances) != values or abs(sum(chances) - 1) > 1e-8:
        raise ValueError(f"{where}: probabilities = {shown(chances)}: give one for each of {values} values, 1 together")


def _strange(value: Any) -> list[Any]:
    """What JSON cannot say."""
    if isinstance(value, list | dict):
        keys = [key for key in value if not isinstance(key, str | int)] if isinstance(value, dict) else []
        return keys + [
            each for part in (value.values() if isinstance(value, dict) else value) for each in _strange(part)
        ]
    if isinstance(value, float) and not isfinite(value):
        return [value]
    return [] if isinstance(value, str | int | float | None) else [value]


def _many(spread: dict[str, Any]) -> int:
    """Values of a grid's parameter."""
    match spread["distribution"]:
        case "constant":
            return 1
        case "categorical":
            return len(spread["values"])
        case "int_uniform":
            return spread["max"] - spread["min"] + 1
    return ceil((spread["max"] - spread["min"]) / spread["q"])


def _grid(spread: dict[str, Any]) -> Sequence[Any]:
    match spread["distribution"]:
        case "constant":
            return [spread["value"]]
        case "categorical":
            return spread["values"]
        case "int_uniform":
            return range(spread["min"], spread["max"] + 1)
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
