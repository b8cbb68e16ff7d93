"""The choice of attention kernels for `scaled_dot_product_attention`."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """Exclude cuDNN's kernels from `scaled_dot_product_attention` on CUDA; change nothing on other devices.

    cuDNN is PyTorch's first choice on Hopper GPUs (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). It builds a
    plan for every new shape, which takes about 0.4 s (transformers issue 48163), and a decoder has a new number of keys
    in every pass. Its backward pass returns NaN for masked rows at sequence lengths with S % 128 == 64 (pytorch issue
    196678), such as LlamaGen's next-token length, 576 = 4 x 128 + 64.
    """
    return sdpa_kernel(WITHOUT_CUDNN) if device.type == "cuda" else nullcontext()
