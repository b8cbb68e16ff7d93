"""Sampling of codes from logits, with one uniform number per code: no generator state, no device synchronization."""

import numpy as np
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def uniforms(images: list[int], codes: int, *, seed: int) -> Tensor:
    """Return one uniform number in [0, 1) for each code of each image, float32 (B, N).

    Row b depends only on (seed, images[b]), so an image is the same in any batch, on any rank and after any restart,
    and comparable across windows. The numbers are multiples of 2^-24, exact in float32.

    Args:
        images: Indices of the images.
        codes: N, numbers per image.
        seed: Seed of the random numbers.
    """
    rows = [np.random.Generator(np.random.Philox(key=[seed, image])).integers(2**24, size=codes) for image in images]
    return torch.from_numpy(np.stack(rows).astype(np.float32) / 2**24)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance: logits (2 B, ...), conditional rows first, to (B, ...).

    Computed in float32 or better, as in LlamaGen (autoregressive/models/gpt.py: `self.output(h).float()`).
    """
    conditional, unconditional = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
    return unconditional + (conditional - unconditional) * scale


def sample(logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sample codes, int64 (N,), from logits (N, V) with uniform numbers (N,) in [0, 1); see `probabilities`."""
    if temperature == 0:
        return logits.argmax(-1)
    return sample_inverse_cdf(probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p), uniform)


def probabilities(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the probabilities that codes are sampled from, (N, V), in float32 or better.

    Args:
        logits: (N, V).
        temperature: 0 keeps only the most probable code.
        top_k: Keep this many most probable codes; 0 keeps all.
        top_p: Keep the most probable codes up to this cumulative probability; 1 keeps all.
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
    """Sample codes, int64 (N,), by inverting the cumulative sums of (N, V) at uniform numbers (N,) in [0, 1).

    Rows need not sum to one.
    """
    cdf = two_rows(probabilities).cumsum(-1)[: len(probabilities)]
    # uniform < 1 keeps the threshold below the last sum, so a code of probability zero is never sampled
    threshold = uniform.to(cdf.dtype)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)


def two_rows(x: Tensor) -> Tensor:
    """Return (N, V) unchanged if N > 1, and a single row expanded to two, so that cumulative sums are deterministic.

    On CUDA, the cumulative sum of a single row uses CUB's device-wide scan, whose order of additions, and therefore
    last bits, may differ between runs. Two or more rows are added in a fixed order (PyTorch,
    aten/src/ATen/native/cuda/ScanUtils.cuh: `scan_dim` checks whether `self.numel() == self.size(dim)`).
    """
    return x.expand(2, -1) if len(x) == 1 else x


def accept_or_resample(
    code: Tensor, before: Tensor, now: Tensor, accept: Tensor, resample: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept codes sampled from `before` under `now`, or resample them, by the rule of speculative sampling.

    Args:
        code: Codes sampled from `before`, int64 (M,).
        before, now: Earlier and current probabilities, (M, V).
        accept, resample: Uniform numbers (M,) in [0, 1), to accept codes and to resample rejected ones.

    Returns:
        Which codes are accepted, bool (M,), and the codes after resampling, int64 (M,).
    """
    index, rest = code[:, None], (now - before).clamp(min=0)
    accepted = accept.to(now) * before.gather(1, index)[:, 0] < now.gather(1, index)[:, 0]
    accepted |= rest.sum(-1) == 0  # the same distribution up to rounding
    return accepted, torch.where(accepted, code, sample_inverse_cdf(rest, resample))
