"""Trials of a sweep: for a grid the same as W&B's, in the same order; for a random sweep, sampled values."""

from collections.abc import Sequence
from itertools import islice, product
from math import exp, log, prod
from typing import Any

import numpy as np
import yaml

from zipar_train.io.errors import truncate
from zipar_train.sweep.distributions import MOST
from zipar_train.sweep.spec import Sweep


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
    return [{key: _sample(spread, rng) for key, spread in sweep.parameters.items()} for _ in range(count)]


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


def _sample(spread: dict[str, Any], rng: np.random.Generator) -> Any:
    if "value" in spread:
        return spread["value"]
    if "values" in spread:
        return spread["values"][int(rng.choice(len(spread["values"]), p=spread.get("probabilities")))]
    kind, low, high = spread["distribution"].removeprefix("q_"), spread.get("min", 0), spread.get("max", 1)
    match kind:
        case "int_uniform":
            return int(rng.integers(low, high + 1))
        case "uniform":
            value = rng.uniform(low, high)
        case "log_uniform":
            value = exp(rng.uniform(low, high))
        case "inv_log_uniform":
            value = exp(-rng.uniform(low, high))
        case "log_uniform_values" | "inv_log_uniform_values":
            value = exp(rng.uniform(log(low), log(high)))
        case "beta":
            value = rng.beta(spread["a"], spread["b"])
        case _:
            value = rng.normal(spread["mu"], spread["sigma"])
            value = exp(value) if kind == "log_normal" else value
    if (step := spread.get("q")) is not None:
        value = round(value / step) * step
    return value if isinstance(value, int) else float(value)
