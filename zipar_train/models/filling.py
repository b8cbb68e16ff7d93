"""Loading of tensors into models: memory allocation, and checks of names, shapes, kinds and finite values."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from zipar_train.io.errors import truncate

M = TypeVar("M", bound=nn.Module)


def allocate(model: nn.Module, *, device: torch.device | str) -> None:
    """Allocate memory for a model on the meta device, whose weights will be loaded from a file."""
    model.to_empty(device=device)
    find_frequencies(model, device=device)


def find_frequencies(model: nn.Module, *, device: torch.device | str) -> None:
    """Recompute the tables of rotary embeddings, which are in no file, in float32 for any dtype of the weights."""
    for part in model.modules():
        if hasattr(part, "inv_freq") and hasattr(part, "config"):
            with torch.device("cpu" if str(device) == "meta" else device):
                part.__init__(part.config)  # type: ignore[misc]


def filled(make: Callable[[], M], state: dict[str, Tensor], *, where: Path, what: str, device: str = "meta") -> M:
    """Build a model on the CPU with the tensors of a file.

    Args:
        make: Builds the model on `device`; its sizes may come from the file.
        state: The tensors of the file.
        where: The file, for errors.
        what: The problem and the remedy, for errors: "is not a VQ-16. Give the published file".

    Raises:
        ValueError: If the model cannot be built, or if the tensors are not the model's; names the file.
    """
    wrong, _, remedy = what.partition(". ")
    try:
        with torch.device(device):
            model = make()
    except Exception as error:  # sizes from a damaged file may fail anywhere in a constructor
        reason = truncate((str(error).strip().split("\n") or [""])[0], length=200)
        message = reason if isinstance(error, ValueError) else f"{type(error).__name__} {reason}"
        raise ValueError(f"{where} {wrong}: {message}. {remedy}") from error
    if device == "meta":
        allocate(model, device="cpu")
    if problems := unaccounted(state, model.state_dict()):
        raise ValueError(f"{where} {wrong}. {problems}. {remedy}")
    check_numbers(state, model.state_dict(), where=where)
    model.load_state_dict(state)
    return model


def unaccounted(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Describe tensors that are missing, surplus, or differ in shape or kind from the wanted ones; empty if none do."""
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
    """Check that all values of the wanted tensors are finite, also after conversion to the wanted dtype.

    Raises:
        ValueError: If they are not; names the file and the first such tensor.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel() or name not in wanted:
            continue
        low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())  # propagates NaN
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
