"""The choice of how forward passes are computed: PyTorch's operators, torch.compile, or Triton kernels."""

import os
from typing import NamedTuple

from zipar_train.decoding.decoder import Decoder
from zipar_train.models.family import Family

METHODS = ("plain", "compiled", "fused")


class DecodeMethod(NamedTuple):
    """A way to compute passes, and why it was chosen.

    Attributes:
        name: "plain": PyTorch's operators. "compiled": by torch.compile. "fused": passes of up to 32 rows in Triton
            kernels, see `zipar_train.decoding.kernels.fused_decoder`; all others are plain.
        reason: A few words for people.
    """

    name: str
    reason: str

    @property
    def decoder(self) -> type[Decoder]:
        """Return the class of the decoder that computes passes this way."""
        if self.name != "fused":
            return Decoder
        from zipar_train.decoding.kernels.fused_decoder import FusedDecoder  # needs Triton

        return FusedDecoder


def decode_method(family: Family, *, compile: bool = False) -> DecodeMethod:
    """Return how passes are computed: by the environment variable ZIPAR_DECODE, as asked, or by a comparison.

    On a GPU the Triton kernels and PyTorch's operators are compared on the model's own weights. The kernels are chosen
    if their logits agree and they are faster. The comparison takes seconds, and the first one on a machine, which
    compiles the kernels, up to a minute.

    Args:
        family: The generator, after `fuse_for_inference`.
        compile: Use torch.compile, unless ZIPAR_DECODE is set.

    Raises:
        ValueError: If ZIPAR_DECODE is unknown, or the kernels do not support the model or the device.
    """
    asked = os.environ.get("ZIPAR_DECODE")
    if not asked:
        if compile:
            return DecodeMethod("compiled", "torch.compile was asked for")
        if family.model.device.type != "cuda":
            return DecodeMethod("plain", "the Triton kernels need a CUDA GPU")
        return faster_method(family)
    if asked not in METHODS:
        raise ValueError(f"ZIPAR_DECODE={asked} is unknown: use {', '.join(METHODS)}")
    if asked == "fused":
        if family.model.device.type != "cuda":
            raise ValueError("ZIPAR_DECODE=fused needs a CUDA GPU: use plain or compiled")
        from zipar_train.decoding.kernels.fused_decoder import check_support

        check_support(family)
    return DecodeMethod(asked, f"ZIPAR_DECODE={asked}")


def faster_method(family: Family) -> DecodeMethod:
    """Return "fused" if the Triton kernels agree with PyTorch's operators and are faster, otherwise "plain"."""
    try:
        from zipar_train.decoding.kernels.selection import compare  # needs Triton

        found = compare(family)
    except Exception as error:  # whatever goes wrong with a compiler or a GPU, the plain passes remain
        words = str(error).strip() or type(error).__name__
        return DecodeMethod("plain", f"the Triton kernels cannot be used: {words.splitlines()[0]}")
    return DecodeMethod("fused" if found.fused else "plain", f"Triton kernels: {found}")
