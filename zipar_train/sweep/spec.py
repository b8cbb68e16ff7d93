"""Sweep files in W&B's syntax, and their trials: for a grid the same trials as W&B's, in the same order.

Syntax (docs.wandb.ai/guides/sweeps): `method`, `metric`, `parameters` with `value`, `values`, `min` and `max`,
`distribution`, and nested `parameters`. Keys are recipe keys. Entries that only W&B's server and agents read
(`program`, `command`, `early_terminate`, ...) are ignored.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from itertools import islice, product
from math import ceil, exp, isclose, isfinite, log, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from zipar_train.io import safe_yaml as plain
from zipar_train.io.errors import did_you_mean, safe_repr, truncate

MOST = 10_000  # largest number of trials, and of values of a grid's parameter
PARAMETERS = 100
EXPONENTS = {"log_uniform": 300, "inv_log_uniform": 300, "log_normal": 30}  # largest absolute value, otherwise 1e15
Parts = dict[str, float | None]
UNIFORM: Parts = {"min": None, "max": None}
NORMAL: Parts = {"mu": 0.0, "sigma": 1.0}
BETA: Parts = {"a": 1.0, "b": 1.0}
SPREADS: dict[str, Parts] = {  # entries of each distribution, with W&B's defaults; None: required
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": UNIFORM,
    "uniform": UNIFORM,
    "q_uniform": UNIFORM | {"q": 1.0},
    "log_uniform": UNIFORM,  # bounds of the exponent of e
    "q_log_uniform": UNIFORM | {"q": 1.0},
    "inv_log_uniform": UNIFORM,  # bounds of the exponent of 1 / e
    "log_uniform_values": UNIFORM,
    "q_log_uniform_values": UNIFORM | {"q": 1.0},
    "inv_log_uniform_values": UNIFORM,  # the same as log_uniform_values
    "normal": NORMAL,
    "q_normal": NORMAL | {"q": 1.0},
    "log_normal": NORMAL,
    "q_log_normal": NORMAL | {"q": 1.0},
    "beta": BETA,
    "q_beta": BETA | {"q": 1.0},
}
UNSAID = {"value": "constant", "values": "categorical", "min": "uniform"}  # W&B's default distributions
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
        parameters[key] = _spread(key, found, method, path)
    if len(parameters) > PARAMETERS:
        raise ValueError(f"{path}: {len(parameters)} parameters: give at most {PARAMETERS}")
    return Sweep(method, named, metric.get("goal", "minimize"), parameters, cap)


def trials_of(sweep: Sweep, *, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Return the trials of a sweep, each with a value for every recipe key.

    Args:
        sweep: The sweep.
        count: Number of trials of a random sweep, largest number of a grid's. None: the file's run_cap.
        seed: Seed of a random sweep.

    Raises:
        ValueError: If a random sweep has no count, or there are more than `MOST` trials.
    """
    count = count or sweep.cap
    if count is not None and count > MOST:
        raise ValueError(f"--count {count}: more than {MOST:,} trials. Give a smaller one")
    if sweep.method == "grid":
        choices = [_grid(spread) for spread in sweep.parameters.values()]
        whole = prod(map(len, choices))
        if count is None and whole > MOST:
            raise ValueError(
                f"a grid of {truncate(whole, length=20)} trials, more than {MOST:,}. Give fewer values, use method: "
                "random, or give --count or run_cap for the first of them"
            )
        return [dict(zip(sweep.parameters, chosen, strict=True)) for chosen in islice(product(*choices), count)]
    if count is None:
        raise ValueError("a random sweep has no end: give --count, or run_cap in its file")
    rng = np.random.default_rng(seed)
    return [{key: _draw(spread, rng) for key, spread in sweep.parameters.items()} for _ in range(count)]


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Return a trial's values as recipe overrides, `key.path=value`.

    A mapping sets only the keys it contains, like nested `parameters`; an agent's command line does not distinguish
    the two. Strings are parsed as YAML: "{8: 1}" is a mapping.
    """
    found = []
    for key, value in values.items():
        if isinstance(value, dict) and value and all(isinstance(k, str) and k.isidentifier() for k in value):
            found += overrides_of({f"{key}.{below}": v for below, v in value.items()})
        elif isinstance(value, str):
            found.append(f"{key}={value}")
        else:
            text = yaml.safe_dump(_numbered(value), default_flow_style=True, width=2**20, sort_keys=False)
            found.append(f"{key}={text.partition(chr(10) + '...')[0].strip()}")
    return found


def overrides_of_agent(arguments: list[str]) -> list[str]:
    """Return recipe overrides from a W&B agent's arguments, `key.path=value` with the value as a Python literal.

    Format: wandb/sdk/launch/sweeps/utils.py, create_sweep_command_args.
    """
    found = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        try:
            found += overrides_of({key: ast.literal_eval(text)})
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, yaml.YAMLError):  # left to the recipe
            found.append(argument)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Checks of parameters, grid values, and sampling


def _numbered(value: Any) -> Any:
    """Return the value with numeric keys as integers, because JSON turns windows, which are keys, into strings."""
    if isinstance(value, dict):
        return {int(k) if isinstance(k, str) and k.isdecimal() else k: _numbered(v) for k, v in value.items()}
    return [_numbered(each) for each in value] if isinstance(value, list | tuple) else value


def _flat(parameters: dict[str, Any], path: Path, before: str = "") -> list[tuple[str, Any]]:
    """Flatten nested parameters to (recipe key, entries) pairs, sorted at each level in W&B's order."""
    found: list[tuple[str, Any]] = []
    for key, spread in sorted(parameters.items(), key=lambda item: str(item[0])):
        name = f"{before}{truncate(key, length=60)}"
        if not isinstance(key, str) or not _PATH.fullmatch(key):
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


_PATH = re.compile(r"\w[\w-]{0,59}(\.\w[\w-]{0,59}){0,9}", re.ASCII)


def _spread(key: str, given: dict[str, Any], method: str, path: Path) -> dict[str, Any]:
    """Check a parameter and return it with its distribution and all of its entries, with W&B's defaults."""
    where, kind = f"{path}: parameters.{key}", given.get("distribution")
    if kind is None:
        kind = next((UNSAID[part] for part in UNSAID if part in given), None)
        if kind == "uniform" and all(type(given.get(end)) is int for end in UNIFORM):
            kind = "int_uniform"
        if kind == "categorical" and "probabilities" in given:
            kind = "categorical_w_probabilities"
    if not isinstance(kind, str) or kind not in SPREADS:
        raise ValueError(f"{where}: distribution {safe_repr(kind)} is unknown. Known: {', '.join(SPREADS)}")
    parts = SPREADS[kind]
    if missing := [part for part, default in parts.items() if default is None and part not in given]:
        raise ValueError(f"{where}: {kind} needs {' and '.join(missing)}")
    if extra := [part for part in given if part not in parts and part != "distribution"]:
        raise ValueError(
            f"{where}: {kind} has no {truncate(extra[0], length=60)}, but {', '.join(parts)}. Say `distribution`, or "
            "drop it"
        )
    if method == "grid" and kind not in ("constant", "categorical", "int_uniform", "q_uniform"):
        raise ValueError(f"{where}: a grid needs values, not {kind}. Use method: random, or values")
    spread = {**parts, **given, "distribution": kind}
    if "values" in parts and (not isinstance(given["values"], list) or not given["values"]):
        raise ValueError(f"{where}: values = {safe_repr(given['values'])}: a list of at least one")
    if strange := [each for part in ("value", "values") if part in parts for each in _strange(given[part])]:
        raise ValueError(
            f"{where}: {safe_repr(strange[0])} is no text, no finite number, nor a list or mapping of them"
        )
    if "probabilities" in parts:
        chances = given["probabilities"]
        if (
            not isinstance(chances, list)
            or len(chances) != len(given["values"])
            or not all(map(_number, chances))
            or min(chances) < 0
            or not isclose(sum(chances), 1, abs_tol=1e-8, rel_tol=1e-5)
        ):
            raise ValueError(f"{where}: probabilities = {safe_repr(chances)}: one for each of the values, their sum 1")
    for part in parts.keys() - {"value", "values", "probabilities"}:
        _check_number(where, kind, part, spread[part])
    if "min" in parts and not spread["min"] < spread["max"]:
        raise ValueError(f"{where}: min {spread['min']} is not below max {spread['max']}")
    if kind.endswith("log_uniform_values") and spread["min"] <= 0:
        raise ValueError(f"{where}: min {spread['min']} has no logarithm")
    if method == "grid" and (many := _many(spread)) > MOST:
        raise ValueError(f"{where}: a grid of {many:,} values, more than {MOST:,}. Use method: random, or values")
    return spread


def _check_number(where: str, kind: str, part: str, value: Any) -> None:
    """Check that an entry of a distribution is a number, and keeps the sampled values finite."""
    if not _number(value):
        raise ValueError(f"{where}: {part} = {safe_repr(value)} is no number (write 1.0e-4, not 1e-4)")
    most = EXPONENTS.get(kind.removeprefix("q_"), 1e15)
    if abs(value) > most:
        raise ValueError(f"{where}: {part} = {safe_repr(value)}: outside {-most:g} .. {most:g}")
    if kind == "int_uniform" and type(value) is not int:
        raise ValueError(f"{where}: {part} = {value} is no whole number, which int_uniform needs")
    if (part in ("q", "a", "b") and value < 1e-12) or (part == "sigma" and value < 0):
        raise ValueError(f"{where}: {part} = {value} must be above 0")


def _strange(value: Any) -> list[Any]:
    """Return the parts of a value that JSON cannot represent."""
    if isinstance(value, list | dict):
        keys = [key for key in value if not isinstance(key, str | int)] if isinstance(value, dict) else []
        inside = value.values() if isinstance(value, dict) else value
        return keys + [each for part in inside for each in _strange(part)]
    if isinstance(value, float) and not isfinite(value):
        return [value]
    return [] if isinstance(value, str | int | float | None) else [value]


def _many(spread: dict[str, Any]) -> int:
    """Return an upper bound on the number of values of a grid's parameter."""
    match spread["distribution"]:
        case "constant":
            return 1
        case "categorical":
            return len(spread["values"])
        case "int_uniform":
            return spread["max"] - spread["min"] + 1
    return ceil((spread["max"] - spread["min"]) / spread["q"])


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _grid(spread: dict[str, Any]) -> Sequence[Any]:
    """Return a parameter's values; of values that W&B considers equal (1 and 1.0), the last, at the first's place."""
    match spread["distribution"]:
        case "constant":
            return [spread["value"]]
        case "categorical":
            return list({_same(value): value for value in spread["values"]}.values())
        case "int_uniform":
            return range(spread["min"], spread["max"] + 1)
    return np.arange(spread["min"], spread["max"], spread["q"]).tolist()


def _same(value: Any) -> str:
    """Return a key that is equal for values that W&B considers equal: sweeps/grid_search.py, yaml_hash."""
    return yaml.safe_dump(int(value) if isinstance(value, float) and value.is_integer() else value, sort_keys=True)


def _draw(spread: dict[str, Any], rng: np.random.Generator) -> Any:
    if "value" in spread:
        return spread["value"]
    if "values" in spread:
        return spread["values"][int(rng.choice(len(spread["values"]), p=spread.get("probabilities")))]
    kind, low, high = spread["distribution"].removeprefix("q_"), spread.get("min", 0), spread.get("max", 1)
    match kind:
        case "int_uniform":
            return int(rng.integers(low, high + 1))
        case "uniform":
            drawn = rng.uniform(low, high)
        case "log_uniform":
            drawn = exp(rng.uniform(low, high))
        case "inv_log_uniform":
            drawn = exp(-rng.uniform(low, high))
        case "log_uniform_values" | "inv_log_uniform_values":
            drawn = exp(rng.uniform(log(low), log(high)))
        case "beta":
            drawn = rng.beta(spread["a"], spread["b"])
        case _:
            drawn = rng.normal(spread["mu"], spread["sigma"])
            drawn = exp(drawn) if kind == "log_normal" else drawn
    if (step := spread.get("q")) is not None:
        drawn = round(drawn / step) * step
    return drawn if isinstance(drawn, int) else float(drawn)
