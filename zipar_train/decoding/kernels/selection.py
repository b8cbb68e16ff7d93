"""Comparison of the Triton kernels with PyTorch's operators on a model's own weights: agreement and speed."""

from math import sqrt
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipar_train.decoding.decoder import Decoder, Shape
from zipar_train.decoding.kernels.fused_decoder import ROWS, FusedDecoder
from zipar_train.decoding.place import inference_on, wait
from zipar_train.decoding.sampling import code_seeds
from zipar_train.decoding.state import DecodeState
from zipar_train.models.family import Family
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import SamplingParams

COPIES = 2  # rows of an image, under guidance
ROUNDS, PASSES = 3, 10  # of each decoder, in turn; passes per round


class Comparison(NamedTuple):
    """Result of a comparison.

    Attributes:
        difference: Largest relative difference of the logits of a pass.
        bound: Largest that rounding explains.
        plain_ms: Milliseconds of a pass of 2 rows with PyTorch's operators.
        fused_ms: Milliseconds of the same pass with the kernels.
    """

    difference: float
    bound: float
    plain_ms: float
    fused_ms: float

    @property
    def fused(self) -> bool:
        """Return True if the kernels agree and are faster."""
        return self.difference <= self.bound and self.fused_ms < self.plain_ms

    def __str__(self) -> str:
        return (
            f"{self.fused_ms:.2f} ms per pass, PyTorch's operators {self.plain_ms:.2f} ms; logits differ by "
            f"{100 * self.difference:.2g} %, at most {100 * self.bound:.2g} % is rounding"
        )


def rounding(family: Family) -> float:
    """Return the relative difference of logits that rounding explains.

    A layer rounds about eight results to the dtype: two norms, the products, the rotation, attention, two sums. Each
    rounding changes a result by up to eps / 2, and in float32, where sums of a thousand products are as imprecise as
    their results, by some 2^-20. The errors of the two decoders are independent, and add up like a random walk: over L
    layers to at most eps / 2 sqrt(2 8 L). The bound is twice that, since a layer can enlarge an error of its input.
    """
    layers = len(family.model.base_model.layers)  # type: ignore[arg-type]
    return max(torch.finfo(family.model.dtype).eps, 2**-20) * sqrt(16 * layers)


@torch.inference_mode()
def compare(family: Family) -> Comparison:
    """Compare passes of the kernels with PyTorch's, for an image of random codes under guidance.

    The logits are compared in passes of 2 rows, and as many rows as each tile of the kernels holds. The passes of 2
    rows are timed, as CUDA graphs on a GPU.

    Args:
        family: The generator, after `fuse_for_inference`.

    Raises:
        ValueError: If the kernels do not support the model.
    """
    with inference_on(family.model.device):
        plan = Plan.raster(family.grid, prompt=family.prompt_length)
        differences = []
        for slots in (1, *(most // COPIES for most in ROWS)):
            slots = min(slots, plan.slots_ahead(slots))
            plain, fused = (_Passes(make(family, plan), slots) for make in (Decoder, FusedDecoder))
            differences.append(_relative(fused.logits(), plain.logits()))
            if slots == 1:
                seconds = _seconds(plain, fused)
        return Comparison(max(differences), rounding(family), *(1000 * each for each in seconds))


class _Passes:
    """Passes of a decoder at the same place of the same image, with `slots` slots."""

    def __init__(self, decoder: Decoder, slots: int):
        family, plan = decoder.family, decoder.plan
        self.decoder, self.slots, device = decoder, slots, family.model.device
        self.sampling = SamplingParams(guidance=2.0, lookahead=slots if slots > 1 else 0)
        random = torch.Generator().manual_seed(0)
        size = (COPIES, plan.prompt)
        prompt = family.embed(torch.randint(family.codebook_size, size, generator=random).to(device))
        self.codes = torch.randint(family.codebook_size, (1, plan.grid.num_codes), generator=random).to(device)
        seeds = code_seeds([0], plan.grid.num_codes, seed=0).to(device)
        kept = min(decoder.keys(plan.prompt + 2 * slots), decoder.visible.shape[1])  # memory for these passes alone
        decoder.state = DecodeState(family, plan, 1, prompt, None, slots=kept, lookahead=self.sampling.lookahead)
        decoder.state.begin(prompt, None, seeds)
        self.place = 0
        self(plan.prompt, prompt=True)
        self.place = plan.prompt
        self(slots)
        self.place = min(plan.prompt + slots, len(plan) - slots)

    def __call__(self, slots: int, *, prompt: bool = False, keep: bool = False) -> Any:
        state = self.decoder.state
        assert state is not None
        state.slot.fill_(self.place)
        state.tokens[:, :-2] = self.codes
        shape = Shape(slots, self.decoder.keys(self.place + slots), prompt)
        return self.decoder.run_pass(shape, self.sampling, keep=keep)

    def logits(self) -> Tensor:
        """Return the logits of the slots fed, (R, K, V)."""
        return self(self.slots, keep=True)[1][:, : self.slots].float()


def _relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative difference of logits, whose mean does not matter; infinity if one is not a number."""
    found, expected = (z - z.mean(-1, keepdim=True) for z in (found, expected))
    relative = float((found - expected).norm() / expected.norm())
    return relative if relative == relative else float("inf")


def _seconds(*ways: _Passes) -> list[float]:
    """Return the seconds of a pass of each, the fastest of several rounds in turn."""
    device, best = ways[0].decoder.family.model.device, [float("inf")] * len(ways)
    for round_ in range(ROUNDS + 1):
        for number, way in enumerate(ways):
            wait(device)
            start = perf_counter()
            for _ in range(PASSES):
                way(way.slots)
            wait(device)
            if round_:  # the first one captures
                best[number] = min(best[number], (perf_counter() - start) / PASSES)
    return best
