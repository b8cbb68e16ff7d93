"""What training does on a GPU, seen on a CPU: kernels, devices, masks, rates."""

from types import SimpleNamespace

import pytest
import torch
from plain_trainer import CUDA, fitted, trainer
from small import a_batch, family
from torch.utils._python_dispatch import TorchDispatchMode

from zipar_train import ZipARModule
from zipar_train.models import attention
from zipar_train.run.peak_flops import peak_flops
from zipar_train.training.callbacks.average import Average


class Attention:
    """Stands in for `scaled_dot_product_attention`, computes with it, and keeps what `look` says of each call."""

    def __init__(self, monkeypatch, look):
        self.seen, self.look = [], look
        self.real = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", self)

    def __call__(self, query, key, value, attn_mask=None, **more):
        self.seen.append(self.look(query, attn_mask))
        return self.real(query, key, value, attn_mask=attn_mask, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("recompute", [False, True])
def test_no_attention_of_a_fit_may_be_cudnns(monkeypatch, recompute):
    """Forward, validation, and the forward passes that activation checkpointing runs in the backward pass."""
    for where in ("zipar_train.models.family", "zipar_train.training.module"):
        monkeypatch.setattr(f"{where}.attention_kernels", lambda device: attention.attention_kernels(CUDA))
    module = ZipARModule(family("llamagen", 2), windows={2: 1}, val_windows=[2])
    if recompute:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = Attention(monkeypatch, lambda query, mask: (torch.backends.cuda.cudnn_sdp_enabled(), module.training))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    fitted(trainer(num_sanity_val_steps=0), module)
    trained = [cudnn for cudnn, training in calls.seen if training]
    assert len(trained) == 3 * 2 * (2 if recompute else 1) and len(calls.seen) == len(trained) + 2
    assert not any(cudnn for cudnn, _ in calls.seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as it was


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llamagen", "llamagen-t2i", "janus", "lumina", "emu3", "simplear", "glm-image"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_mask_is_converted_once_for_all_layers(monkeypatch, kind, narrow, recompute):
    """In the type of the queries as attention sees them, in rows that need no padding, and not in recomputation."""
    module = ZipARModule(family(kind, 3), windows={2: 1})
    if recompute:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    module.model.train()
    batch = a_batch(kind, module.family)
    dtype = torch.bfloat16 if narrow else torch.float32
    calls = Attention(monkeypatch, lambda query, mask: (mask.data_ptr(), mask.dtype, mask.stride(-2) % 8, mask))
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow, cache_enabled=False):
        loss = module.losses(batch, batch.condition, 2)[0]
    loss.backward()
    assert len(calls.seen) == 3 * (2 if recompute else 1)
    assert len({address for address, *_ in calls.seen}) == 1
    assert {(kind, rest) for _, kind, rest, _ in calls.seen} == {(dtype, 0)}
    slots = len(module.plans.plan(2))
    padded = kind not in ("llamagen",)
    mask = calls.seen[0][3]
    assert mask.shape == (2 if padded else 1, 1, slots, slots) and set(mask.unique().tolist()) == {0.0, -torch.inf}
    seen = module.plans.mask(module.plans.plan(2), module.device)[0, 0]
    assert torch.equal(mask[-1, 0] == 0, seen)  # the last image has no padding
    assert padded is not torch.equal(mask[0, 0] == 0, seen)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name().split("::")[1].split(".")[0])
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llamagen", "llamagen-t2i", "janus", "lumina", "emu3", "simplear", "glm-image"])
def test_the_backward_pass_sorts_no_indices(kind):
    """`index_put` with accumulation sorts its indices on CUDA (aten/src/ATen/native/cuda/Indexing.cu)."""
    module = ZipARModule(family(kind, 2), windows={2: 1})
    batch = a_batch(kind, module.family)
    loss = module.losses(batch, batch.condition, 2)[0]
    with Operators() as operators:
        loss.backward()
    assert "index_add_" in operators.names or "index_add" in operators.names
    assert not {"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"} & set(operators.names)


# ---------------------------------------------------------------------------------------------------------------------
# The average of the weights


def test_the_average_is_on_the_device_that_trains():
    """In `setup` the model is still on the CPU; meta stands in for a GPU."""
    module = ZipARModule(family("llamagen", 1), windows={2: 1})
    device = torch.device("meta")
    callback = Average(decay=0.9)
    callback.setup(SimpleNamespace(strategy=SimpleNamespace(root_device=device)), module, "fit")
    average = callback._average_model
    assert {t.device for t in (*average.parameters(), *average.buffers())} == {device}
    assert module.device.type == "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Rates


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H200", 989.4, 67),
        ("NVIDIA H200 NVL", 835.5, 60),
        ("NVIDIA GH200 480GB", 989.4, 67),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),  # Lightning's
        ("NVIDIA H100 PCIe", 756, 51.2),  # Lightning's
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),  # Lightning's
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA L4", 121, 30.3),  # Lightning's
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8, 126),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 91.1),
        ("NVIDIA A40", 149.7, 37.4),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA Something New", None, None),
    ],
)
def test_rates_are_those_of_data_sheets(monkeypatch, name, bf16, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr("lightning.fabric.accelerators.cuda._is_ampere_or_later", lambda device=None: True)
    for dtype, rate in ((torch.bfloat16, bf16), (torch.float16, bf16), (torch.float32, fp32)):
        found = peak_flops(CUDA, dtype)
        assert found == (None if rate is None else pytest.approx(rate * 1e12))
    torch.set_float32_matmul_precision("high")
    try:
        assert (peak_flops(CUDA, torch.float32) or 0) > (fp32 or -1) * 1e12 or fp32 is None
    finally:
        torch.set_float32_matmul_precision("highest")
    assert peak_flops(torch.device("cpu"), torch.float32) is None
