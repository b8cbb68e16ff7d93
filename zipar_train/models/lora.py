"""Low-rank adapters (PEFT): adding them to a model, loading them, and fingerprints of their base weights."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from zipar_train.models.filling import check_numbers, unaccounted
from zipar_train.recipe.schema import LoRA

MARK = "lora_"  # part of the name of every adapter tensor, and of no other
FINGERPRINT = 64  # most hexadecimal digits of a fingerprint


def adapt(model: PreTrainedModel, lora: LoRA) -> None:
    """Add new adapters, initialised by torch's generator, to a model in place; only they are trained, in float32.

    Raises:
        ValueError: If PEFT rejects `targets`, for example because no layer has such a name.
    """
    try:
        with model.device:  # otherwise adapters of a model on the meta device would take memory
            model.add_adapter(config(lora))
        for name, parameter in model.named_parameters():  # PEFT uses the dtype of the base weights
            if MARK in name:
                parameter.data = parameter.data.float()
    except ValueError as error:
        raise ValueError(
            f"tune.lora.targets = {lora.targets}: PEFT refuses ({str(error).split('. ')[0]}). Linear layers "
            "are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj"
        ) from error


@contextmanager
def without(model: PreTrainedModel) -> Iterator[None]:
    """Disable the adapters of a model in this block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def config(lora: LoRA) -> Any:
    """Return PEFT's configuration for a recipe's adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )


def wrapped(model: PreTrainedModel, lora: LoRA, state: dict[str, Tensor], *, where: Path) -> Any:
    """Return the model as a PeftModel with trained adapters, for saving or merging.

    Args:
        state: Adapter tensors by their names in a model that `adapt` has changed.
        where: The file they come from, for errors.

    Raises:
        ValueError: If they do not match the adapters that `lora` describes, or are not finite.
    """
    from peft import get_peft_model

    peft = get_peft_model(model, config(lora))
    named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    wanted = {name: tensor for name, tensor in peft.state_dict().items() if MARK in name}
    if problems := unaccounted(named, wanted):
        raise ValueError(f"{where}: its adapters are not those of its recipe's tune.lora. {problems}")
    check_numbers(named, wanted, where=where)
    peft.load_state_dict(named, strict=False)
    return peft


def fingerprint(state: dict[str, Tensor]) -> str:
    """Return a short hash that identifies base weights: over names, shapes, and about 64 values of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        flat = state[name].flatten()
        digest.update(f"{name} {list(state[name].shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 64)][:64].float().numpy().tobytes())
    return digest.hexdigest()[:16]
