"""Tensors that adapter training leaves unchanged: checkpoints omit them, because `model.weights` holds them."""

from typing import Any

from torch import Tensor, nn

PARTS = ("state_dict", "current_model_state")  # of a Lightning checkpoint: averaged and current weights


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module that are not trained, by name; none if all parameters are trained."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    adapted = any(not parameter.requires_grad for parameter in module.parameters())
    return {name: tensor for name, tensor in module.state_dict().items() if name not in trained} if adapted else {}


def omit_frozen(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Remove a module's frozen tensors from a Lightning checkpoint of it."""
    frozen = frozen_tensors(module)
    for part in checkpoint.keys() & PARTS:
        checkpoint[part] = {name: tensor for name, tensor in checkpoint[part].items() if name not in frozen}


def add_frozen(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Add a module's frozen tensors to a Lightning checkpoint that omits them."""
    frozen = frozen_tensors(module)
    for part in checkpoint.keys() & PARTS:
        checkpoint[part] = frozen | checkpoint[part]
