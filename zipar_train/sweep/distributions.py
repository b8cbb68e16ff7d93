"""Distributions of a sweep's parameters, with W&B's names and defaults, and the checks of their entries."""

from math import ceil, isclose, isfinite
from typing import Any

from zipar_train.io.errors import safe_repr, truncate

MOST = 10_000  # largest number of trials, and of values of a grid's parameter
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
VALUES = ("value", "values", "probabilities")  # entries that are not numbers
UNSAID = {"value": "constant", "values": "categorical", "min": "uniform"}  # W&B's default distributions


def checked(given: dict[str, Any], method: str, *, where: str) -> dict[str, Any]:
    """Check a parameter and return it with its distribution and all of its entries, with W&B's defaults.

    Args:
        given: The parameter's entries in the file.
        method: Method of the sweep.
        where: The file and the parameter, for error messages.

    Raises:
        ValueError: If the entries are no distribution, or a grid would have more than `MOST` values.
    """
    kind = given.get("distribution")
    kind = _default(given) if kind is None else kind
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
    _check_values(where, {part: spread[part] for part in VALUES if part in parts})
    _check_numbers(where, kind, {part: spread[part] for part in parts if part not in VALUES})
    if method == "grid" and (many := _many(spread)) > MOST:
        raise ValueError(f"{where}: a grid of {many:,} values, more than {MOST:,}. Use method: random, or values")
    return spread


def _default(given: dict[str, Any]) -> str | None:
    """Return the distribution that W&B assumes if a parameter does not name one."""
    kind = next((UNSAID[part] for part in UNSAID if part in given), None)
    if kind == "uniform" and all(type(given.get(end)) is int for end in UNIFORM):
        return "int_uniform"
    return "categorical_w_probabilities" if kind == "categorical" and "probabilities" in given else kind


def _check_values(where: str, entries: dict[str, Any]) -> None:
    """Check the entries that list values: that there are some, that JSON can represent them, and their chances."""
    values = entries.get("values")
    if "values" in entries and (not isinstance(values, list) or not values):
        raise ValueError(f"{where}: values = {safe_repr(values)}: a list of at least one")
    if strange := [each for part in ("value", "values") if part in entries for each in _strange(entries[part])]:
        raise ValueError(
            f"{where}: {safe_repr(strange[0])} is no text, no finite number, nor a list or mapping of them"
        )
    if "probabilities" in entries:
        chances = entries["probabilities"]
        if (
            not isinstance(chances, list)
            or len(chances) != len(entries["values"])
            or not all(map(_number, chances))
            or min(chances) < 0
            or not isclose(sum(chances), 1, abs_tol=1e-8, rel_tol=1e-5)
        ):
            raise ValueError(f"{where}: probabilities = {safe_repr(chances)}: one for each of the values, their sum 1")


def _check_numbers(where: str, kind: str, entries: dict[str, Any]) -> None:
    """Check the entries that are numbers, each by itself and the bounds together."""
    for part, value in entries.items():
        _check_number(where, kind, part, value)
    if "min" in entries and not entries["min"] < entries["max"]:
        raise ValueError(f"{where}: min {entries['min']} is not below max {entries['max']}")
    if kind.endswith("log_uniform_values") and entries["min"] <= 0:
        raise ValueError(f"{where}: min {entries['min']} has no logarithm")


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
