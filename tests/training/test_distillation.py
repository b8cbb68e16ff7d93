"""Distillation: towards the model before windows, or without its adapters."""

import pytest
import torch
from short_runs import LORA, losses, tuned

from zipar_train import load
from zipar_train.data.batch import Batch
from zipar_train.models.family import teacher_forced
from zipar_train.models.restore import read
from zipar_train.plan.masks import dense
from zipar_train.training.fit import fit
from zipar_train.training.module import ZipARModule
from zipar_train.training.trainer import build_module


@pytest.mark.slow
def test_distillation_pulls_towards_the_untouched_model(tiny, tmp_path, base):
    """Next-token alone it has nothing to mend: no divergence, no gradient. With windows it keeps next-token closer."""
    start = load(base).load_family().model.state_dict()
    fit(tuned(tiny, tmp_path, base, "still", "tune.distill=1.0", "zipar.windows={8: 1}", "trainer.max_steps=1"))
    assert abs(losses(tmp_path / "still")[0]) < 1e-6
    moved = {}
    for name, share in (("half", 0.5), ("none", 0.0)):
        fit(tuned(tiny, tmp_path, base, name, f"tune.distill={share}", "optim.lr=1e-2"))
        state = read(tmp_path / name).state
        assert len(state) == len(start)  # the teacher is not saved
        moved[name] = _divergence(load(base), load(tmp_path / name))
    assert moved["half"] < 0.8 * moved["none"]


def _divergence(a, b, window=None):
    codes, labels = a.generate(list(range(10)), seed=1).codes.flatten(1), torch.arange(10)
    plans = (a.plan(), b.plan(window))
    with torch.no_grad():
        p, q = (
            teacher_forced(g.load_family(), plan, codes, labels, dense(plan)).log_softmax(-1)
            for g, plan in zip((a, b), plans, strict=True)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
def test_adapters_are_taught_by_the_model_without_them(tiny, tmp_path, base):
    """No second copy of the weights: the divergence is that from the base's own file, and only adapters learn."""
    settings = [LORA, "tune.distill=1.0", "zipar.windows={2: 1}", "optim.lr=1e-2", "trainer.max_epochs=1"]
    recipe = tuned(tiny, tmp_path, base, "run", *settings)
    fit(recipe)
    untouched, module = load(base), build_module(recipe)
    assert module.teacher is None
    module.on_load_checkpoint(saved := torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True))
    module.load_state_dict(saved["state_dict"])
    codes, labels = untouched.generate(list(range(10)), seed=1).codes.flatten(1), torch.arange(10)
    found = module.eval().losses(Batch(codes, labels), labels, 2, with_teacher=True)[1]
    assert float(found.detach()) == pytest.approx(_divergence(untouched, load(tmp_path / "run"), 2), rel=1e-4)
    found.backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in module.state_dict() if "lora_" in name}


@pytest.mark.slow
def test_distillation_needs_a_teacher(base):
    """Frozen weights are no adapters."""
    family = load(base).load_family()
    family.model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match="distill needs a teacher"):
        ZipARModule(family, windows={2: 1}, distill=0.5)
