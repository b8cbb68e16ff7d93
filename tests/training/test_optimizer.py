"""The optimizer: torch's clipping to the bit, fused under mixed precision; bad gradients stop or are skipped."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from plain_trainer import CUDA, fitted, trainer
from short_runs import losses, quick
from small import family
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import AdamW

from zipar_train import ZipARModule
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.training import module as training
from zipar_train.training import optimizer as optimizers
from zipar_train.training.callbacks.checkpoint import Checkpoint
from zipar_train.training.fit import fit
from zipar_train.training.guard import Guard
from zipar_train.training.optimizer import build_optimizer, clip_gradients, gradient_norm, parameters_of

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


@pytest.mark.slow
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


@pytest.mark.slow
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
