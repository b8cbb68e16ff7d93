"""What training does on a GPU, seen on a CPU: kernels, devices, masks, optimizers, rates."""

import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from short_runs import losses, quick
from small import a_batch, family
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from zipar_train import ZipARModule
from zipar_train.models import attention
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.peak_flops import peak_flops
from zipar_train.training import module as training
from zipar_train.training import optimizer as optimizers
from zipar_train.training.callbacks.average import Average
from zipar_train.training.callbacks.checkpoint import Checkpoint
from zipar_train.training.fit import fit
from zipar_train.training.guard import Guard
from zipar_train.training.optimizer import build_optimizer, clip_gradients, gradient_norm, parameters_of

CUDA = torch.device("cuda")


def trainer(**arguments):
    quietly = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_steps": 3,
        "max_epochs": 1,
    }
    return L.Trainer(**quietly | arguments)


def fitted(trainer, module, kind="llamagen", images=3):
    """Train in a plain Trainer on random images; the batches."""
    torch.manual_seed(1)
    batches = [a_batch(kind, module.family) for _ in range(images)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    return batches


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


@pytest.mark.parametrize("kind", ["llamagen", "llamagen-t2i", "janus", "lumina", "emu3"])
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
    slots = len(module.plans[2])
    padded = kind not in ("llamagen",)
    mask = calls.seen[0][3]
    assert mask.shape == (2 if padded else 1, 1, slots, slots) and set(mask.unique().tolist()) == {0.0, -torch.inf}
    seen = module.mask(2)[0, 0]
    assert torch.equal(mask[-1, 0] == 0, seen)  # the last image has no padding
    assert padded is not torch.equal(mask[0, 0] == 0, seen)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name().split("::")[1].split(".")[0])
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llamagen", "llamagen-t2i", "janus", "lumina", "emu3"])
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
# The optimizer


def gradients(scale):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, float("nan")])
@pytest.mark.parametrize("most", [None, 0.0, 0.7])
def test_clipping_is_torchs_to_the_bit(algorithm, scale, most):
    ours, theirs = gradients(scale), gradients(scale)
    parameters = list(ours.parameters())
    clip_gradients(parameters, gradient_norm(parameters), most, algorithm)
    if most:
        (clip_grad_norm_ if algorithm == "norm" else clip_grad_value_)(theirs.parameters(), most)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad.nan_to_num(9.0), b.grad.nan_to_num(9.0))


def test_fit_and_bench_build_one_optimizer(monkeypatch):
    chosen = {}
    monkeypatch.setattr(optimizers, "AdamW", lambda groups, **more: chosen.update(more) or AdamW(groups, **more))
    model = family("llamagen", 1).model
    made = build_optimizer(model, lr=1e-3, weight_decay=0.1)
    assert chosen["fused"] is None  # bits of CPU runs stay
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]
    assert set(parameters_of(made)) == set(model.parameters())
    assert optimizers.fused(CUDA) is True


def wise(kind, module):
    return {
        "16-mixed": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10)),
        "bf16-mixed": MixedPrecision("bf16-mixed", "cpu"),
    }[kind]


@pytest.mark.parametrize("kind", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimizer_clips_under_mixed_precision(monkeypatch, kind, algorithm):
    """Lightning's own clipping refuses one; and unscaled gradients are what is clipped and told."""
    found = {}
    for choice in (None, True):
        monkeypatch.setattr(optimizers, "fused", lambda device, choice=choice: choice)
        module, norms = ZipARModule(family("llamagen", 1), windows={2: 1}, lr=1e-2, label_dropout=0), []

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer, module, *rest, norms=norms):
                clipped = [p.grad for p in module.model.parameters()]
                norms.append((module.metrics["train/grad_norm"], float(torch.nn.utils.get_total_norm(clipped))))

        plugin = wise(kind, module)
        fitted(
            trainer(plugins=[plugin], gradient_clip_val=1e-2, gradient_clip_algorithm=algorithm, callbacks=[Watch()]),
            module,
        )
        assert module.trainer.optimizers[0].param_groups[0]["fused"] is choice
        found[choice] = ([p.detach().clone() for p in module.model.parameters()], norms)
        assert all(total > 0.05 for total, _ in norms)
        if algorithm == "norm":
            assert [clipped for _, clipped in norms] == pytest.approx([1e-2] * 3, rel=1e-3)
        else:
            assert all(clipped < total for total, clipped in norms)
    assert found[True][1] == [pytest.approx(pair, rel=1e-2) for pair in found[None][1]]
    for a, b in zip(found[True][0], found[None][0], strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_a_checkpoint_resumes_with_the_kernel_of_its_new_device(tiny, tmp_path, monkeypatch):
    """PyTorch restores `fused` from the checkpoint: a run moved to a GPU would keep the loop, and one moved back the
    fused kernel, whose bits are others."""
    recipe = load_recipe("digits-base", quick(tiny, tmp_path, "run", "trainer.limit_train_batches=2"))
    fit(recipe)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    from zipar_train.training.trainer import build_module

    module = build_module(recipe)
    for device, expected in ((CUDA, True), (torch.device("cpu"), None)):
        stand_in = SimpleNamespace(accumulate_grad_batches=1, strategy=SimpleNamespace(root_device=device))
        Checkpoint(recipe).on_load_checkpoint(stand_in, module, saved)
        assert [group["fused"] for group in saved["optimizer_states"][0]["param_groups"]] == [expected] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The guard


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_nan_in_one_gradient_stops_or_is_skipped(tiny, tmp_path, monkeypatch, precision, capsys):
    """As from a kernel's backward pass: the loss is finite."""
    more = ["trainer.max_epochs=1", "trainer.limit_train_batches=6", f"trainer.precision={precision}"]
    backward = training.ZipARModule.backward

    def spoilt(module, loss, *args, **kwargs):
        backward(module, loss, *args, **kwargs)
        if module.trainer.global_step == 3:
            next(p for name, p in module.named_parameters() if "k_proj" in name).grad[0, 0] = torch.nan

    monkeypatch.setattr(training.ZipARModule, "backward", spoilt)
    with pytest.raises(
        ValueError, match=r"step 4: loss [\d.]+, gradient norm nan: not finite. Its images: train-000000"
    ):
        fit(load_recipe("digits-base", quick(tiny, tmp_path, "stopped", *more)))
    fit(load_recipe("digits-base", quick(tiny, tmp_path, "skipped", *more, "health.on_nonfinite=skip")))
    assert "skipped: step 4: " in capsys.readouterr().err
    assert len(losses(tmp_path / "skipped")) == 6
    assert all(torch.isfinite(tensor).all() for tensor in read(tmp_path / "skipped").state.values())


@pytest.mark.parametrize(("scale", "stops"), [(2.0**10, False), (1.0, True)])
def test_a_scaler_may_overflow_and_only_that(monkeypatch, scale, stops):
    """Under 16-mixed precision a gradient that is not finite lowers the scale; at a scale of 1 it is the step's own."""
    module = ZipARModule(family("llamagen", 1), windows={2: 1}, guard=Guard(gradients="stop"))
    backward, plugin = training.ZipARModule.backward, wise("16-mixed", module)
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def spoilt(module, loss, *args, **kwargs):
        backward(module, loss, *args, **kwargs)
        next(module.parameters()).grad[0, 0] = torch.inf

    monkeypatch.setattr(training.ZipARModule, "backward", spoilt)
    before = [p.detach().clone() for p in module.model.parameters()]
    if stops:
        with pytest.raises(ValueError, match="not finite"):
            fitted(trainer(plugins=[plugin]), module)
    else:
        fitted(trainer(plugins=[plugin]), module)
        assert plugin.scaler.get_scale() == scale / 2**3
    assert all(torch.equal(a, b) for a, b in zip(before, module.model.parameters(), strict=True))


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
