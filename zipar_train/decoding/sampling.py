"""From logits to codes, by one uniform number each: no generator state, no look at the device."""

import numpy as np
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def uniforms(images: list[int], codes: int, *, seed: int) -> Tensor:
    """One number in [0, 1) for each code of each image, float32 (B, N).

    Row b depends on (seed, images[b]) alone: an image is the same in any batch, on any rank, after any restart, and
    comparable draw for draw across windows. Multiples of 2^-24, exact in float32.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, image])).integers(2**24, size=codes) for image in images]
    return torch.from_numpy(np.stack(rows).astype(np.float32) / 2**24)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: rows (2B, ...) of logits, conditional above unconditional, to (B, ...).

    In float32 or better, as LlamaGen does (autoregressive/models/gpt.py: `self.output(h).float()`).
    """
    conditional, unconditional = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
    return unconditional + (conditional - unconditional) * scale


def sample(logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Codes, int64 (N,), of logits (N, V), by one number (N,) in [0, 1) each; see `probabilities`."""
    if temperature == 0:
        return logits.argmax(-1)
    return sample_inverse_cdf(probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p), uniform)


def probabilities(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What codes are drawn from, (N, V), float32 or better.

    Args:
        logits: (N, V).
        temperature: 0 leaves the most probable code alone.
        top_k: keep this many most probable codes; 0 keeps all.
        top_p: keep the most probable codes up to this share of probability; 1 keeps all.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    if temperature != 1:
        logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        logits = TopKLogitsWarper(min(top_k, logits.shape[-1]))(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, two_rows(logits))[: len(logits)]
    return logits.softmax(-1)


def sample_inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Codes, int64 (N,): of each row (N, V), which need not sum to one, the code at a share (N,) in [0, 1) of it."""
    cdf = two_rows(probabilities).cumsum(-1)[: len(probabilities)]
    # uniform < 1 keeps the threshold below the last sum, so a code of probability zero is never drawn
    threshold = uniform.to(cdf.dtype)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)


def two_rows(x: Tensor) -> Tensor:
    """What is summed along its rows (N, V), with a single row given twice.

    On CUDA, sums along one row alone come from CUB's device-wide scan, whose order of additions, and so whose last
    bits, may differ from run to run. Two rows and more are added in a fixed order (PyTorch,
    aten/src/ATen/native/cuda/ScanUtils.cuh: `scan_dim` asks whether `self.numel() == self.size(dim)`).
    """
    return x.expand(2, -1) if len(x) == 1 else x


def accept_or_resample(
    code: Tensor, before: Tensor, now: Tensor, accept: Tensor, anew: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes (M,) that were drawn from probabilities `before`, (M, V), made codes of `now`: speculative sampling's rule.

    Args:
        accept, anew: (M,) in [0, 1), to accept by, and to draw what is not accepted anew.

    Returns:
        Whether each is accepted, and what it is now.
    """
    index, rest = code[:, None], (now - before).clamp(min=0)
    accepted = accept.to(now) * before.gather(1, index)[:, 0] < now.gather(1, index)[:, 0]
    accepted |= rest.sum(-1) == 0  # the same laws, but for rounding
    return accepted, torch.where(accepted, code, sample_inverse_cdf(rest, anew))
