"""Optimizer, learning-rate schedule and gradient clipping, shared by `fit` and `bench --train`."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

Schedule = Literal["cosine", "constant"]


def fused(device: torch.device) -> bool | None:
    """Return the value of AdamW's `fused` for a device: True on CUDA, otherwise None (PyTorch's default).

    The fused kernel rounds differently. CPUs keep the loop over tensors, so that runs there stay reproducible bit by
    bit.
    """
    return True if device.type == "cuda" else None


def build_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.05
) -> AdamW:
    """Build AdamW over the trained parameters of a model, fused on CUDA.

    Weight decay applies to the weights of linear layers and embeddings, not to biases and norms (some norms are
    matrices, with a row for each head).

    Args:
        model: A model on its training device. Parameters without `requires_grad` are left out.
        lr: Learning rate.
        betas: Decay rates of the averages of gradients and of their squares.
        weight_decay: AdamW's coefficient: each step scales a weight by 1 - lr * weight_decay.
    """
    matrices = {part.weight for part in model.modules() if isinstance(part, nn.Linear | nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if p not in matrices], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=betas, fused=fused(trained[0].device) if trained else None)


def build_schedule(optimizer: AdamW, kind: Schedule, *, steps: int, warmup: float) -> LambdaLR:
    """Build the schedule of the learning rate, called once per optimizer step.

    Args:
        optimizer: The optimizer, with the peak learning rate.
        kind: "cosine" (to zero) or "constant" after the warmup.
        steps: Number of optimizer steps in the run.
        warmup: Share of all steps over which the learning rate rises linearly from zero.
    """
    if kind == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, round(warmup * steps), steps)
    return get_constant_schedule_with_warmup(optimizer, round(warmup * steps))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups, in the order in which norms are summed."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, a scalar; a DTensor if gradients are sharded."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    norm: Tensor,
    max_norm: float | None,
    algorithm: Literal["norm", "value"] = "norm",
) -> None:
    """Clip gradients in place, as `torch.nn.utils.clip_grad_norm_` or `clip_grad_value_` does.

    Args:
        parameters: Parameters whose gradients are clipped.
        norm: Norm of the gradients from `gradient_norm`; it is not computed again.
        max_norm: Largest norm, or largest absolute value under "value". None or 0: no clipping.
        algorithm: "norm" multiplies all gradients by min(1, max_norm / (norm + 1e-6)); "value" clamps each number.
    """
    if max_norm is None or max_norm <= 0:
        return
    if algorithm == "value":
        clip_grad_value_(parameters, max_norm)
    else:
        clip_grads_with_norm_(parameters, max_norm, norm)
