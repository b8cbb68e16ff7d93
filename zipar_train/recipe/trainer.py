"""The `trainer:` section of a recipe: arguments of lightning.Trainer and their ranges. Does not import torch."""

import ast
import importlib.util
import re
from collections.abc import Mapping
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from zipar_train.io.errors import did_you_mean, safe_repr, truncate

DEVICES = 128  # most devices per node
CLOCK = r"\d{1,4}:[0-5]?\d:[0-5]?\d:[0-5]?\d"  # days:hours:minutes:seconds

Steps = Annotated[int, Field(ge=1, le=10**9)]
Switch = bool | None


def _batches(value: Any, *, least: int) -> Any:
    """Check a number of batches, or a fraction of an epoch."""
    if value is None or (type(value) is int and least <= value <= 10**9):
        return value
    if type(value) is float and (value > 0 or value == least == 0) and value <= 1:
        return value
    above = "above" if least else "from"
    raise ValueError(f"give a whole number of batches from {least}, or a share {above} 0.0 to 1.0")


def _interval(value: Any) -> Any:
    """Check an interval between validations: batches, a fraction of an epoch, or a time."""
    return value if isinstance(value, str) and re.fullmatch(CLOCK, value) else _batches(value, least=1)


def _limit(value: Any) -> Any:
    """Check a limit on steps or epochs."""
    if value is None or (type(value) is int and (value == -1 or 1 <= value <= 10**9)):
        return value
    raise ValueError("give a whole number from 1, or -1 for no limit")


def _devices(value: Any) -> Any:
    number = type(value) is int and (value == -1 or 1 <= value <= DEVICES)
    text = isinstance(value, str) and re.fullmatch(r"auto|-1|[1-9]\d?|\d{1,3}(, ?\d{1,3})+|\d{1,3},", value)
    chosen = isinstance(value, list) and all(type(each) is int and 0 <= each < 1000 for each in value)
    if number or text or (chosen and 1 <= len(value) == len(set(value))):
        return value
    raise ValueError(f"give auto, a whole number from 1 to {DEVICES}, -1 for all, or a list of devices' numbers")


def _time(value: Any) -> Any:
    units = isinstance(value, dict) and value and value.keys() <= {"weeks", "days", "hours", "minutes", "seconds"}
    if units and all(type(each) is int and 0 <= each <= 10**6 for each in value.values()):
        return value
    if value is None or (isinstance(value, str) and re.fullmatch(CLOCK, value)):
        return value
    raise ValueError('write it in quotes as "days:hours:minutes:seconds", for example "00:12:00:00"')


def _try_out(value: Any) -> Any:
    if isinstance(value, bool) or (type(value) is int and 0 <= value <= 10**6):
        return value
    raise ValueError("give true, false, or a number of batches from 0")


def _deterministic(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value == "warn":
        return value
    raise ValueError("give true, false or warn")


Some = Annotated[Any, AfterValidator(partial(_batches, least=1))]
Batches = Annotated[Any, AfterValidator(partial(_batches, least=0))]


class TrainerArguments(TypedDict, total=False):
    """The Trainer arguments that recipes check; the installed Lightning checks all others."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "fsdp"]
    devices: Annotated[Any, AfterValidator(_devices)]
    num_nodes: Annotated[int, Field(ge=1, le=10**4)]
    precision: (
        Literal[
            "32-true",
            "16-mixed",
            "bf16-mixed",
            "16-true",
            "bf16-true",
            "64-true",
            "transformer-engine",
            "transformer-engine-float16",
            "16",
            "bf16",
            "32",
            "64",
            16,
            32,
            64,
        ]
        | None
    )
    fast_dev_run: Annotated[Any, AfterValidator(_try_out)]
    max_epochs: Annotated[Any, AfterValidator(_limit)]
    min_epochs: Annotated[int, Field(ge=0, le=10**9)] | None
    max_steps: Annotated[Any, AfterValidator(_limit)]
    min_steps: Annotated[int, Field(ge=0, le=10**9)] | None
    max_time: Annotated[Any, AfterValidator(_time)]
    limit_train_batches: Some
    limit_val_batches: Batches
    limit_test_batches: Batches
    limit_predict_batches: Batches
    overfit_batches: Batches
    val_check_interval: Annotated[Any, AfterValidator(_interval)]
    check_val_every_n_epoch: Steps | None
    num_sanity_val_steps: Annotated[int, Field(ge=-1, le=10**9)] | None
    log_every_n_steps: Steps | None
    enable_progress_bar: Switch
    enable_model_summary: Switch
    accumulate_grad_batches: Annotated[int, Field(ge=1, le=4096)]
    gradient_clip_val: Annotated[float, Field(ge=0, le=10**6)] | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    deterministic: Annotated[Any, AfterValidator(_deterministic)]
    benchmark: Switch
    inference_mode: bool
    use_distributed_sampler: bool
    profiler: Literal["simple", "advanced", "pytorch"] | None
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: Annotated[int, Field(ge=0, le=10**9)]
    enable_autolog_hparams: bool
    model_registry: str | None


OURS = {
    "callbacks": "In Python, add yours to the trainer that zipar_train.training.trainer.build_trainer returns.",
    "plugins": "They are Python objects; trainer.precision and trainer.strategy choose among Lightning's.",
    "logger": "See log.wandb; a CSV log is always written.",
    "default_root_dir": "See run_dir.",
    "enable_checkpointing": "See checkpoint_every.",
}


def disagreements(trainer: Mapping[str, Any]) -> list[str]:
    """List conflicts among arguments that are each within their range, and arguments that are not allowed."""
    mistakes = []
    if trainer.get("max_epochs") == -1 and trainer.get("max_steps", -1) in (-1, None):
        mistakes.append("trainer.max_epochs = -1: the schedule needs an end. Set it, or trainer.max_steps.")
    devices = trainer.get("devices")
    if trainer.get("strategy") == "fsdp" and (devices == -1 or not isinstance(devices, int | list)):
        mistakes.append(f"trainer.devices = {devices!r}: trainer.strategy = fsdp needs their number on a node.")
    for key, value in islice(trainer.items(), 50):
        if key in OURS:
            mistakes.append(f"trainer.{key} = {safe_repr(value)}: zipar-train sets this itself. {OURS[key]}")
        elif key not in trainer_arguments():
            known = did_you_mean("trainer.", key, trainer_arguments())
            name = truncate(key, length=60)
            mistakes.append(f"trainer.{name} = {safe_repr(value)}: not an argument of lightning.Trainer.{known}")
    return mistakes


@cache
def trainer_arguments() -> tuple[str, ...]:
    """Return the argument names of lightning.Trainer, parsed from its source so that torch is not imported.

    Raises:
        ValueError: If lightning is not installed, or this version is not supported.
    """
    spec = importlib.util.find_spec("lightning")
    if spec is None or spec.origin is None:
        raise ValueError("lightning is not installed: pip install 'lightning>=2.6.4'")
    source = Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
            return tuple(argument.arg for argument in init.args.kwonlyargs)
    raise ValueError(f"no Trainer class in {source}: this lightning is not supported")
