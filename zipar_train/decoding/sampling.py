"""Sampling of codes from logits, with noise that is fixed in advance: the code is a function of its logits.

The noise of an entry depends on the seed, the image, the code and the entry alone. It is the same in any batch, on any
device and after any restart, and for all decoders. No generator state is kept, and the host never waits.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# SplitMix64's increment and multipliers (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014), as signed integers
INCREMENT, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def code_seeds(images: Iterable[int], codes: int, *, seed: int) -> Tensor:
    """Return 64 random bits for each code of each image, int64 (B, N), from which its noise follows.

    Row b depends only on (seed, images[b]), so an image is the same in any batch, on any rank and after any restart,
    and comparable across windows.

    Args:
        images: Indices of the images.
        codes: N, seeds per image.
        seed: Seed of the random numbers.
    """
    rows = [np.random.Philox(key=[seed, image]).random_raw(codes) for image in images]
    return torch.from_numpy(np.stack(rows).view(np.int64))


def check_seeds(seeds: Tensor, images: int, codes: int) -> None:
    """Check seeds before they are used.

    Args:
        seeds: int64 (B, N), from `code_seeds`.
        images: B.
        codes: N, seeds per image.

    Raises:
        ValueError: If the seeds have another dtype or shape. As integers, numbers of torch.rand would all be 0.
    """
    if seeds.dtype != torch.int64 or seeds.shape != (images, codes):
        raise ValueError(
            f"seeds are {seeds.dtype} {tuple(seeds.shape)}, not torch.int64 ({images}, {codes}): make them with "
            f"zipar_train.code_seeds(range({images}), {codes}, seed=0)"
        )


def uniform(seeds: Tensor, entries: int) -> Tensor:
    """Return `entries` random numbers of each seed, uniform in (0, 1), float64 (..., V).

    Entry v is output v of the generator SplitMix64 from that seed: a counter-based hash in integers, which all devices
    compute alike. The numbers are odd multiples of 2^-53.

    Args:
        seeds: int64 (...).
        entries: V.
    """
    x = seeds[..., None] + torch.arange(1, entries + 1, device=seeds.device) * INCREMENT
    shifted = torch.empty_like(x)  # in place: faster on a CPU from 16 seeds on
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        x ^= torch.bitwise_right_shift(x, shift, out=shifted).bitwise_and_(2 ** (64 - shift) - 1)  # a logical shift
        x *= factor
    return x.bitwise_right_shift_(12).double().mul_(2.0**-52).add_(0.5 + 2.0**-53)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance: logits (2 B, ...), conditional rows first, to (B, ...).

    Computed in float32 or better, as in LlamaGen (autoregressive/models/gpt.py: `self.output(h).float()`).
    """
    conditional, unconditional = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
    return unconditional + (conditional - unconditional) * scale


def sample(logits: Tensor, seeds: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sample codes, int64 (N,), from logits (N, V), each with the noise of its seed (N,); see `probabilities`."""
    return sample_from(probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p), seeds)


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


def sample_from(probabilities: Tensor, seeds: Tensor) -> Tensor:
    """Sample codes, int64 (...), from probabilities (..., V), each with the noise of its seed (...).

    With exponential noise E, argmax(p / E) has the distribution p. It is Gumbel-max, argmax(log p + G), as G = -log E
    has a Gumbel distribution. Under the same noise, similar distributions mostly give the same code. Rows need not sum
    to one. A code of probability zero is never sampled.
    """
    exponential = uniform(seeds, probabilities.shape[-1]).log_().neg_()
    return (probabilities / exponential).argmax(-1)


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
        accept, resample: Seeds (M,), to accept codes and to resample rejected ones.

    Returns:
        Which codes are accepted, bool (M,), and the codes after resampling, int64 (M,).
    """
    index, rest = code[:, None], (now - before).clamp(min=0)
    accepted = uniform(accept, 1)[:, 0].to(now) * before.gather(1, index)[:, 0] < now.gather(1, index)[:, 0]
    accepted |= rest.sum(-1) == 0  # the same distribution up to rounding
    return accepted, torch.where(accepted, code, sample_from(rest, resample))
