"""Runs that stop and resume: the same to the bit, with one process or two; shares of FSDP; what is not resumed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import sets
from families import llamagen
from forked import Running, together
from short_runs import losses, quick, states_equal

from zipar_train import ZipARModule
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.signals import Stopped
from zipar_train.training.callbacks.checkpoint import Checkpoint
from zipar_train.training.fit import fit
from zipar_train.training.fsdp import fsdp_units

LONG = ["checkpoint_every=3", "optim.ema_decay=0.9", "data.micro_batch_size=8"]


@pytest.fixture(scope="module")
def whole(made_tiny, tmp_path_factory):
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    fit(load_recipe("digits-base", quick(made_tiny, folder, "whole", *LONG)))
    return folder / "whole"


@pytest.mark.slow(seconds=25)
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])  # SIGKILL: test_survival
def test_a_stopped_run_resumes_to_the_same_bits(tiny, tmp_path, whole, signum, status):
    """The real process, really interrupted in mid-epoch: its losses, weights and EMA end as if nothing had happened."""
    broken = quick(tiny, tmp_path, "broken", *LONG)
    running = Running("fit", "--recipe", "digits-base", *sets(broken), log=tmp_path / "log")
    checkpoint = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    running.until(checkpoint.is_file)
    time.sleep(0.3)
    running.kill(signum)
    assert running.ended(60) == status, running.said()
    assert "Traceback" not in running.said()
    assert f"stopped by {signum.name}" in running.said() and "--resume" in running.said()
    step = read(checkpoint).extra["global_step"]
    assert 0 < step < 2 * 180
    fit(load_recipe("digits-base", broken), resume=True)
    a, b = read(whole), read(tmp_path / "broken")
    assert a.extra["global_step"] == b.extra["global_step"] == 2 * 180
    expected, got = losses(whole), losses(tmp_path / "broken")
    assert {k: v for k, v in expected.items() if k >= step} == {k: v for k, v in got.items() if k >= step}
    assert expected.keys() - got.keys() <= {step - 1}  # a stop takes the last step's log line with it
    assert states_equal(a.state, b.state)
    current_a, current_b = a.extra["current_model_state"], b.extra["current_model_state"]
    assert states_equal(current_a, current_b)
    assert not states_equal(a.state, {k.removeprefix("model."): v for k, v in current_a.items()})


@pytest.mark.slow
def test_a_stop_of_the_whole_process_group_leaves_a_checkpoint(tiny, tmp_path):
    """As SLURM and `timeout` do it: loader processes get the signal too."""
    overrides = quick(tiny, tmp_path, "run", "checkpoint_every=2", "data.workers=2", "trainer.max_epochs=50")
    running = Running("fit", "--recipe", "digits-base", *sets(overrides), log=tmp_path / "log", session=True)
    running.until((tmp_path / "run" / "checkpoints" / "last.ckpt").is_file)
    running.kill_group(signal.SIGTERM)
    assert running.ended(60) == 143, running.said()
    assert "stopped by SIGTERM" in running.said()
    assert "Traceback" not in running.said()


@pytest.mark.slow
@pytest.mark.parametrize("more", ["trainer.limit_train_batches=7", "trainer.accumulate_grad_batches=4"])
def test_resuming_is_exact_with_short_epochs_and_gathered_gradients(tiny, tmp_path, monkeypatch, more):
    """Stopped in this process, by the flag that a signal sets, at a moment chosen badly."""
    fit(load_recipe("digits-base", quick(tiny, tmp_path, "whole", more)))
    broken = load_recipe("digits-base", quick(tiny, tmp_path, "broken", more))
    steps = ZipARModule.training_step

    def stop_at(module, batch, batch_idx):
        if module.current_epoch == 1 and batch_idx == 1:
            next(c for c in module.trainer.callbacks if isinstance(c, Checkpoint)).heard.signum = signal.SIGTERM
        return steps(module, batch, batch_idx)

    monkeypatch.setattr(ZipARModule, "training_step", stop_at)
    with pytest.raises(Stopped):
        fit(broken)
    monkeypatch.setattr(ZipARModule, "training_step", steps)
    fit(broken, resume=True)
    assert states_equal(read(tmp_path / "whole").state, read(tmp_path / "broken").state)


@pytest.mark.slow(seconds=25)
def test_two_processes_share_an_epoch_and_with_fsdp_the_weights(tiny, tmp_path):
    """On the CPU: half the steps, one checkpoint, lines told once; killed and resumed.

    The console script starts the second process itself; the processes with FSDP are started as torchrun does.
    """

    def two(strategy, *more):
        overrides = quick(tiny, tmp_path, strategy, "trainer.devices=2", f"trainer.strategy={strategy}")
        short = ["trainer.max_epochs=1", "checkpoint_every=3"]
        return ["fit", "--recipe", "digits-base", *sets([*overrides, *short, *more])]

    script = Path(sys.executable).parent / "zipar-train"
    watched = two("ddp", "log.wandb=offline", "log.images=3")  # by the first process alone
    done = subprocess.run([script, *watched], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1, step 23") == 1
    (run,) = (tmp_path / "ddp" / "wandb").glob("offline-run-*")
    assert len(list(run.rglob("*.png"))) == 2 * 3
    killed = together(2, *two("fsdp"), log=tmp_path / "killed")
    killed[0].until((tmp_path / "fsdp" / "checkpoints" / "last.ckpt").is_file)
    for process in killed:
        process.kill(signal.SIGKILL)
    assert [process.ended() for process in killed] == [-signal.SIGKILL] * 2
    assert read(tmp_path / "fsdp").extra["global_step"] < 23
    resumed = together(2, *two("fsdp"), "--resume", log=tmp_path / "resumed")
    assert [process.ended(200) for process in resumed] == [0, 0], resumed[0].said()
    whole, shared = (read(tmp_path / name) for name in ("ddp", "fsdp"))
    assert whole.extra["global_step"] == shared.extra["global_step"] == 23
    assert whole.state.keys() == shared.state.keys()
    assert max((whole.state[name] - shared.state[name]).abs().max() for name in whole.state) < 1e-5


def test_fsdp_shares_every_weight():
    family = llamagen(4, 4)
    shared = [parameter for unit in fsdp_units(family.model) for parameter in unit.parameters()]
    assert set(shared) == set(family.model.parameters()) and len(shared) == len(set(shared))


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_another_recipe_is_refused(tiny, tmp_path, capsys):
    overrides = quick(tiny, tmp_path, "run")
    recipe = load_recipe("digits-base", overrides)
    fit(recipe)
    before = read(recipe.run_dir).state
    with pytest.raises(ValueError, match="already holds a run. Continue it with --resume"):
        fit(recipe)
    fit(recipe, resume=True)
    assert states_equal(read(recipe.run_dir).state, before)
    with pytest.raises(ValueError, match=r"made by another recipe: optim.lr: 0.003 -> 0.5"):
        fit(load_recipe("digits-base", [*overrides, "optim.lr=0.5"]), resume=True)
