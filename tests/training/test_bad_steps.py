"""Bad steps: they stop the run or are skipped, and name their images; the guard looks at recent losses."""

import pytest
import torch
from short_runs import SHORT, losses, quick

from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit
from zipar_train.training.guard import Guard
from zipar_train.training.module import ZipARModule


def bad_at(step, how, monkeypatch):
    """From a training step on, for one step, a gradient or a loss is not what it should be."""
    losses_of = ZipARModule.losses

    def hurt(module, *args, **kwargs):
        loss, divergence = losses_of(module, *args, **kwargs)
        if module.training and module.model.training and module.trainer.global_step == step:
            loss = loss * (float("nan") if how == "loss" else 50.0)
            if how == "gradient":
                loss.register_hook(lambda g: g * float("inf"))
        return loss, divergence

    monkeypatch.setattr(ZipARModule, "losses", hurt)


@pytest.fixture(scope="module")
def before(made_tiny, tmp_path_factory):
    """Losses of a run without a bad step."""
    folder = tmp_path_factory.mktemp("plain")
    fit(
        load_recipe(
            "digits-base",
            quick(made_tiny, folder, "plain", *SHORT, "trainer.max_epochs=1", "health.loss_spike_factor=3"),
        )
    )
    return losses(folder / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loss", "gradient", "leap"])
def test_bad_steps_stop_or_are_skipped_and_name_their_images(tiny, tmp_path, monkeypatch, before, how, capsys):
    bad_at(25, how, monkeypatch)
    overrides = quick(tiny, tmp_path, "run", *SHORT, "trainer.max_epochs=1", "health.loss_spike_factor=3")
    with pytest.raises(ValueError, match=r"step 26: .*Its images: train-000000.tar/\S+, .*on_spike = skip") as stopped:
        fit(load_recipe("digits-base", overrides))
    assert ("not finite" in str(stopped.value)) == (how != "leap")
    assert read(tmp_path / "run").extra["global_step"] == 24

    capsys.readouterr()
    skip = [*overrides, "health.on_nonfinite=skip", "health.on_spike=skip"]
    fit(load_recipe("digits-base", skip), resume=True)  # health may differ
    assert "skipped: step 26: " in capsys.readouterr().err
    after = losses(tmp_path / "run")
    assert [after[i] for i in range(25)] == [before[i] for i in range(25)] and len(after) == 40
    assert after[26] != before[26]  # a step less
    state = read(tmp_path / "run").extra
    assert state["guard"]["skipped"] == 1
    assert {int(s["step"]) for s in state["optimizer_states"][0]["state"].values()} == {39}
    assert all(torch.isfinite(t).all() for t in read(tmp_path / "run").state.values())


def test_the_guard_looks_at_recent_losses_and_gives_up_in_the_end():
    guard = Guard(gradients="skip", spike=2.0, on_spike="skip", most=3)
    assert guard.verdict(100.0, 1.0) is None  # too few to compare with
    for _ in range(40):
        assert guard.verdict(1.0, 1.0) is None
    assert guard.verdict(1.99, 1.0) is None and guard.verdict(2.01, 1.0)[0] == "skip"
    assert guard.verdict(1.0, float("nan"))[0] == "skip"
    restored = Guard(gradients="skip", spike=2.0, on_spike="skip", most=3)
    restored.load_state_dict(guard.state_dict())
    for each in (guard, restored):
        assert each.verdict(float("inf"), 1.0)[0] == "skip" and each.skipped == 3
        what, why = each.verdict(3.0, 1.0)
        assert what == "stop" and "after 3 skipped steps in a row" in why
