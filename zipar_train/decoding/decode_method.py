"""The choice of how forward passes are computed: PyTorch's operators, torch.compile, or Triton kernels."""

import os

from zipar_train.models.family import Family

METHODS = ("plain", "compiled", "fused")


def decode_method(family: Family, *, compile: bool) -> str:
    """Return how passes are computed: the environment variable ZIPAR_DECODE, or "compiled" or "plain" as asked.

    plain: PyTorch's operators. compiled: by torch.compile. fused: passes of up to 32 rows in Triton kernels, see
    `zipar_train.decoding.kernels.fused_decoder`; all others are plain.

    Raises:
        ValueError: If ZIPAR_DECODE is unknown, or the kernels do not support the model or the device.
    """
    method = os.environ.get("ZIPAR_DECODE") or ("compiled" if compile else "plain")
    if method not in METHODS:
        raise ValueError(f"ZIPAR_DECODE={method} is unknown: use {', '.join(METHODS)}")
    if method == "fused":
        if family.model.device.type != "cuda":
            raise ValueError("ZIPAR_DECODE=fused needs a CUDA GPU: use plain or compiled")
        from zipar_train.decoding.kernels.fused_decoder import check_support

        check_support(family)
    return method
