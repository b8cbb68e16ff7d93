"""Low-rank adapters by PEFT: put into a model to train, told apart from its own weights, merged into them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from zipar_train.models.filling import check_numbers, unaccounted
from zipar_train.recipe.schema import LoRA

MARK = "lora_"  # in the name of every adapter tensor, and of no other
FINGERPRINT = 64  # hexadecimal digits of a fingerprint, at most


def adapt(model: PreTrainedModel, lora: LoRA) -> None:
    """Put fresh adapters, drawn from torch's generator, into a model in place; they alone are trained, in float32.

    Raises:
        ValueError: if no layer has one of the names in `targets`.
    """
    try:
        with model.device:  # or those of a model of the meta device would take memory
            model.add_adapter(config(lora))
        for name, parameter in model.named_parameters():  # PEFT gives them the type of the weights beside them
            if MARK in name:
                parameter.data = parameter.data.float()
    except ValueError as error:
        raise ValueError(
            f"tune.lora.targets = {lora.targets}: PEFT refuses ({str(error).split('. ')[0]}). Linear layers "
            "are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj"
        ) from error


@contextmanager
def without(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before `adapt`, for as long as this lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def config(lora: LoRA):
    """PEFT's configuration of a recipe's adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )


def wrapped(model: PreTrainedModel, lora: LoRA, state: dict[str, Tensor], *, where: Path):
    """The model as a PeftModel with trained adapters, for saving or merging.

    Args:
        state: adapter tensors, by the names they have in an adapted model.
        where: the file they come from, for errors.

    Raises:
        ValueError: if they are not the adapters that `lora` speaks of, or not finite.
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
    """A short hash that tells one file of base weights from another: names, shapes, and 64 numbers of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        flat = state[name].flatten()
        digest.update(f"{name} {list(state[name].shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 64)][:64].float().numpy().tobytes())
    return digest.hexdigest()[:16]
