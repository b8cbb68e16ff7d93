"""Peak FLOPS of a device according to its data sheet, for utilisation figures."""

import re

import torch
from lightning.fabric.utilities.throughput import get_available_flops

BF16, TF32, FP32 = "bfloat16", "tf32", "float32"  # float16 is as fast as bfloat16

# Dense FLOPS in units of 1e12; data sheets print twice these figures, "with sparsity". They are from NVIDIA's data
# sheets of H200, H100, GH200, HGX B200 and B300, GB200 and GB300 NVL72, L40S, L40, and from its whitepapers "RTX
# Blackwell PRO GPU Architecture" (RTX PRO 6000), "Ada GPU Architecture" (RTX 6000 Ada) and "Ampere GA102 GPU
# Architecture" (A40, A6000). The first pattern that matches the device's name applies.
SHEETS: dict[str, dict[str, float]] = {
    r"\bgh200\b": {BF16: 989.4, TF32: 494.7, FP32: 67},
    r"\bh200 nvl\b": {BF16: 835.5, TF32: 417.5, FP32: 60},
    r"\bh200\b": {BF16: 989.4, TF32: 494.7, FP32: 67},
    r"\bh100 nvl\b": {BF16: 835.5, TF32: 417.5, FP32: 60},
    r"\bgb[23]00\b": {BF16: 2500, TF32: 1250, FP32: 80},
    r"\bb[23]00\b": {BF16: 2250, TF32: 1125, FP32: 75},
    r"\bl40s\b": {BF16: 362, TF32: 183, FP32: 91.6},
    r"\bl40\b": {BF16: 181, TF32: 90.5, FP32: 90.5},
    r"\brtx pro 6000 blackwell\b(?!.*max-q)": {BF16: 503.8, TF32: 251.9, FP32: 126},
    r"\brtx 6000 ada\b": {BF16: 364.2, TF32: 182.1, FP32: 91.1},
    r"\brtx a6000\b": {BF16: 154.8, TF32: 77.4, FP32: 38.7},
    r"\ba40\b": {BF16: 149.7, TF32: 74.8, FP32: 37.4},
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak dense FLOPS of a device; None if unknown.

    `SHEETS` takes precedence over Lightning's table, which lacks "NVIDIA H200" and newer names, takes "NVIDIA L40S" for
    an L4, and gives the H100 NVL twice its rate. A MIG slice is an unknown fraction of its device.

    Args:
        dtype: The dtype of matrix products; float32 is TF32 if `torch.set_float32_matmul_precision` allows it.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        if re.search(r"\bmig\b", name):
            return None
        found = next((rates for pattern, rates in SHEETS.items() if re.search(pattern, name)), None)
        kind = {torch.bfloat16: BF16, torch.float16: BF16, torch.float32: FP32}.get(dtype)
        if found and kind == FP32 and torch.get_float32_matmul_precision() != "highest":
            kind = TF32
        if found and kind:
            return found[kind] * 1e12
    known = get_available_flops(device, dtype)
    return None if known is None else float(known)
