"""Models filled with tensors of files: memory allocated, every tensor accounted for, every number finite."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from zipar_train.io.errors import truncate

M = TypeVar("M", bound=nn.Module)


def allocate(model: nn.Module, *, device: torch.device | str) -> None:
    """Memory for a model of the meta device, for weights that come from a file."""
    model.to_empty(device=device)
    find_frequencies(model, device=device)


def find_frequencies(model: nn.Module, *, device: torch.device | str) -> None:
    """Rotary embeddings' tables anew: they lie in no file, and are float32 whatever the weights are."""
    for part in model.modules():
        if hasattr(part, "inv_freq") and hasattr(part, "config"):
            with torch.device("cpu" if str(device) == "meta" else device):
                part.__init__(part.config)  # type: ignore[misc]


def filled(make: Callable[[], M], state: dict[str, Tensor], *, where: Path, what: str, device: str = "meta") -> M:
    """A model with tensors of a file, on the CPU.

    Args:
        make: builds the model, on `device`; its sizes may come from the file.
        what: in errors, what the file should be, and the remedy: ("is no VQ-16", "Give the published file").

    Raises:
        ValueError: naming the file, if the model cannot be built, or the tensors are not the model's.
    """
    wrong, _, remedy = what.partition(". ")
    try:
        with torch.device(device):
            model = make()
    except Exception as error:  # sizes that a damaged file tells fail anywhere in a constructor
        reason = truncate((str(error).strip().split("\n") or [""])[0], length=200)
        told = reason if isinstance(error, ValueError) else f"{type(error).__name__} {reason}"
        raise ValueError(f"{where} {wrong}: {told}. {remedy}") from error
    if device == "meta":
        allocate(model, device="cpu")
    if problems := unaccounted(state, model.state_dict()):
        raise ValueError(f"{where} {wrong}. {problems}. {remedy}")
    check_numbers(state, model.state_dict(), where=where)
    model.load_state_dict(state)
    return model


def unaccounted(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What is wrong with tensors that should be the wanted ones, in words; empty if nothing is."""
    missing, surplus = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    both = wanted.keys() & state.keys()
    shapes = {
        name: f"{name} is {list(state[name].shape)}, not {list(wanted[name].shape)}"
        for name in both
        if wanted[name].shape != state[name].shape
    }
    kinds = [
        f"{name} is {_kind(state[name])}, not {_kind(wanted[name])}"
        for name in both - shapes.keys()
        if wanted[name].is_floating_point() != state[name].is_floating_point()
        or wanted[name].is_complex() != state[name].is_complex()
    ]
    return "; ".join(
        f"{len(names)} {title}: {', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}"
        for title, names in (
            ("missing", missing),
            ("surplus", surplus),
            ("of another shape", shapes.values()),
            ("of another kind", kinds),
        )
        if names
    )


def check_numbers(state: dict[str, Tensor], wanted: dict[str, Tensor], *, where: str | Path) -> None:
    """Every number of the wanted tensors is finite, and stays so in the type that is wanted.

    Raises:
        ValueError: naming the file and the first tensor that holds others.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel() or name not in wanted:
            continue
        low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())  # NaN comes through
        most = torch.finfo(wanted[name].dtype).max
        if not (-most <= low.item() and high.item() <= most):
            finite = bool(torch.isfinite(low) and torch.isfinite(high))
            what = f"numbers too large for {_kind(wanted[name])}" if finite else "NaN or infinite numbers"
            raise ValueError(
                f"{where}: {name} holds {what}. Its run has diverged, or the file is damaged: give an older "
                "checkpoint, or copy the file again"
            )


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
