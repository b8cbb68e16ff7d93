"""Runs that nothing ends badly: killed anywhere, shared by processes, by clocks that jump, by their cluster."""

import csv
import io
import os
import random
import signal
import time

import pytest
import torch
from commands import sets
from forked import Running, together
from short_runs import SHORT, losses, quick, same_end, some, states_equal

from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.checkpoints import damage, newest_first
from zipar_train.run.metrics_csv import validations
from zipar_train.run.signals import Stopped
from zipar_train.training.callbacks.checkpoint import Checkpoint
from zipar_train.training.fit import fit
from zipar_train.training.module import ZipARModule


@pytest.fixture(scope="module")
def whole(made_tiny, tmp_path_factory):
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    fit(load_recipe("digits-base", quick(made_tiny, folder, "whole", *SHORT)))
    return folder / "whole"


@pytest.mark.slow(seconds=25)
def test_twenty_kills_change_nothing(tiny, tmp_path, whole):
    """SIGKILL at random moments, a third of them while a checkpoint is being written."""
    verb = ["fit", "--recipe", "digits-base", *sets(quick(tiny, tmp_path, "broken", *SHORT)), "--resume"]
    rng, folder, writing = random.Random(0), tmp_path / "broken" / "checkpoints", 0
    part = folder / "next.ckpt.part"
    for number in range(20):
        part.unlink(missing_ok=True)
        running = Running(*verb, log=tmp_path / f"log{number}")
        if number % 3 == 0:
            running.until(part.exists)
        else:
            running.until(lambda running=running: "A step is" in running.said())  # so that the run gets on
            time.sleep(rng.uniform(0, 0.35))
        running.kill(signal.SIGKILL)
        assert running.ended() == -signal.SIGKILL, running.said()  # not over yet
        writing += part.exists()
    last = Running(*verb, log=tmp_path / "last")
    assert last.ended() == 0, last.said()
    assert writing >= 3
    same_end(whole, tmp_path / "broken")
    assert [damage(path) for path in (*newest_first(tmp_path / "broken"), folder / "best.ckpt")] == [None] * 3
    assert [read(path).extra["global_step"] for path in newest_first(tmp_path / "broken")] == [80, 78]
    best = [read(run / "checkpoints" / "best.ckpt") for run in (whole, tmp_path / "broken")]
    assert states_equal(best[0].state, best[1].state) and best[0].extra["least"] == best[1].extra["least"]


WAYS = {  # processes, images of a batch, more
    "one": (1, 16, []),
    "gathered": (1, 8, []),
    "two": (2, 8, []),
    "two gathered": (2, 4, []),
    "uneven": (2, 5, []),  # five do not divide eight: four at a time
}


@pytest.mark.slow(seconds=25)
def test_any_number_of_processes_ends_alike(tiny, tmp_path, shards):
    """The same step of 16 images in float64: losses, weights, averages; also of a run begun by one, ended by two.

    793 images are 49 steps and a half, which is filled up.

    But for rounding, which transformers' norms do in float32 whatever the model's type.
    """
    common = [
        "optim.global_batch_size=16",
        "trainer.precision=64-true",
        "optim.ema_decay=0.9",
        "trainer.max_epochs=1",
        "zipar.windows={8: 1, 2: 1}",
        "checkpoint_every=15",
        "trainer.log_every_n_steps=1",
        f"data.train={some(shards, tmp_path / 'some', 793)}/train.json",
        "trainer.check_val_every_n_epoch=1",
    ]

    def run(name, world, *overrides):
        overrides = [*tiny, *common, f"run_dir={tmp_path}/{name}", f"trainer.devices={world}", *overrides]
        verb = ["fit", "--recipe", "digits-base", *sets(overrides), "--resume"]
        log = tmp_path / f"{name}.log"
        started = together(world, *verb, log=log) if world > 1 else [Running(*verb, log=log)]
        assert [process.ended() for process in started] == [0] * world, started[0].said()
        return started

    for name, (world, images, more) in WAYS.items():
        run(name, world, f"data.micro_batch_size={images}", *more)
    assert "A step is 2 devices x 4 images x 2 batches" in (tmp_path / "uneven.0").read_text()
    alone = sets([*tiny, *common, f"run_dir={tmp_path}/begun", "data.micro_batch_size=16"])
    begun = Running("fit", "--recipe", "digits-base", *alone, log=tmp_path / "begun.log")
    begun.until(lambda: newest_first(tmp_path / "begun"))
    begun.kill(signal.SIGTERM)
    assert begun.ended() == 143, begun.said()
    step = read(tmp_path / "begun").extra["global_step"]
    assert 15 <= step < 50
    said = run("begun", 2, "data.micro_batch_size=4")[0].said()
    assert f"Resuming from {tmp_path}/begun/checkpoints/last.ckpt: step {step}, in epoch 1." in said
    expected, one = losses(tmp_path / "one"), read(tmp_path / "one")
    assert len(expected) == 50
    for name in (*WAYS, "begun"):
        found, other = losses(tmp_path / name), read(tmp_path / name)
        assert found.keys() == expected.keys(), name
        assert max(abs(found[i] - expected[i]) for i in found) < 1e-8, name
        for key in one.state:
            assert torch.allclose(one.state[key], other.state[key], rtol=0, atol=1e-7), (name, key)
        bits, ones = (validations(tmp_path / which)[49] for which in (name, "one"))
        assert bits.keys() == {"val/bits_w8", "val/bits_w2"}
        assert bits == pytest.approx(ones, abs=1e-6), name  # metrics are kept in float32


def test_steps_that_devices_cannot_share_are_refused_with_numbers(tiny, tmp_path):
    from zipar_train.training.trainer import split_batch

    recipe = load_recipe("digits-base", [*tiny, "optim.global_batch_size=64", "data.micro_batch_size=12"])
    assert [split_batch(recipe, world) for world in (1, 2, 8, 64)] == [(8, 8), (8, 4), (8, 1), (1, 1)]
    with pytest.raises(
        ValueError,
        match=r"64 images cannot be shared by 3 devices. Use 1, 2, 4 devices, or --set "
        r"optim.global_batch_size=66 or 63",
    ):
        split_batch(recipe, 3)
    with pytest.raises(ValueError, match="optim.global_batch_size already sets the step size. Drop one"):
        load_recipe("digits-base", [*tiny, "optim.global_batch_size=64", "trainer.accumulate_grad_batches=2"])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.slow
def test_the_newest_whole_checkpoint_is_found_whatever_the_clock_says(tiny, tmp_path, capsys):
    overrides = quick(tiny, tmp_path, "run", *SHORT, "checkpoint_keep=3", "trainer.max_epochs=1")
    fit(load_recipe("digits-base", overrides))
    found = newest_first(tmp_path / "run")
    assert [path.name for path in found] == ["last.ckpt", "step-00000038.ckpt", "step-00000036.ckpt"]
    for path, day in zip(found, (1, 2, 3), strict=True):  # the oldest looks newest
        os.utime(path, (day * 86400, day * 86400))
    data = bytearray(found[0].read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 100)  # more than what lies between tensors
    data[middle] = bytes(byte ^ 1 for byte in data[middle])
    found[0].write_bytes(data)
    found[1].write_bytes(found[1].read_bytes()[:-1000])
    longer = [*overrides, "trainer.max_epochs=2"]
    capsys.readouterr()
    fit(load_recipe("digits-base", longer), resume=True, allow=["trainer.max_epochs"])
    out = capsys.readouterr().out
    assert "last.ckpt is damaged" in out and "step-00000038.ckpt is damaged" in out
    assert "step-00000036.ckpt: step 36, in epoch 1" in out
    for path in newest_first(tmp_path / "run"):
        path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="none of its checkpoints is whole"):
        fit(load_recipe("digits-base", longer), resume=True)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tiny, tmp_path, monkeypatch, whole):
    real, jumps = time.time, random.Random(1)
    monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-1e6, 1e6))
    broken = load_recipe("digits-base", quick(tiny, tmp_path, "broken", *SHORT))
    steps = ZipARModule.training_step

    def stop_at(module, batch, batch_idx):
        if module.current_epoch == 1 and batch_idx == 11:
            next(c for c in module.trainer.callbacks if isinstance(c, Checkpoint)).heard.signum = signal.SIGTERM
        return steps(module, batch, batch_idx)

    monkeypatch.setattr(ZipARModule, "training_step", stop_at)
    with pytest.raises(Stopped, match=r"last.ckpt of step 52 is whole"):
        fit(broken)
    monkeypatch.setattr(ZipARModule, "training_step", steps)
    fit(broken, resume=True)
    same_end(whole, tmp_path / "broken")


@pytest.mark.slow
def test_differences_that_are_meant_are_named_and_take_effect(tiny, tmp_path, monkeypatch):
    overrides = quick(tiny, tmp_path, "run", *SHORT, "trainer.max_epochs=1")
    fit(load_recipe("digits-base", overrides))
    other = [*overrides, "trainer.max_epochs=2", "optim.lr=0.05", "optim.weight_decay=0.2"]
    with pytest.raises(
        ValueError,
        match="say that you mean it with --allow-change optim.lr --allow-change optim.weight_decay "
        "--allow-change trainer.max_epochs",
    ):
        fit(load_recipe("digits-base", other), resume=True, allow=["data.shuffle"])
    with pytest.raises(
        ValueError, match=r"model.hidden_size: 16 -> 32. Resume with the recipe it was made by, or write"
    ):
        fit(
            load_recipe("digits-base", [*overrides, "model.hidden_size=32"]),
            resume=True,
            allow=["model.hidden_size", "model"],
        )
    fit(load_recipe("digits-base", other), resume=True, allow=["optim", "trainer.max_epochs"])
    groups = read(tmp_path / "run").extra["optimizer_states"][0]["param_groups"]
    assert [(g["initial_lr"], g["weight_decay"]) for g in groups] == [(0.05, 0.2), (0.05, 0.0)]
    text = (tmp_path / "run" / "logs" / "version_1" / "metrics.csv").read_text()
    rates = [float(row["train/lr"]) for row in csv.DictReader(io.StringIO(text)) if row["train/lr"]]
    assert 0.02 < max(rates) < 0.05 and rates == sorted(rates, reverse=True)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").optim.lr == 0.05


@pytest.mark.slow
def test_two_runs_do_not_write_into_one_folder(tiny, tmp_path):
    overrides = quick(tiny, tmp_path, "run", "checkpoint_every=1", "trainer.max_epochs=50", "data.workers=1")
    verb = ["fit", "--recipe", "digits-base", *sets(overrides), "--resume"]
    first = Running(*verb, log=tmp_path / "first")
    first.until(lambda: newest_first(tmp_path / "run"))
    second = Running(*verb, log=tmp_path / "second")
    assert second.ended() == 2
    assert f"process {first.process.pid} on " in second.said() and "is at work in it" in second.said()
    first.kill(signal.SIGKILL)
    assert first.ended() == -signal.SIGKILL
    third = Running(*verb, log=tmp_path / "third")  # at once, while the first's loader process may still live
    third.until(lambda: "Resuming from" in third.said())
    third.until(lambda: "A step is" in third.said())
    third.kill(signal.SIGTERM)
    third.ended()


# ---------------------------------------------------------------------------------------------------------------------
# Clusters


@pytest.mark.slow
def test_slurm_hands_the_job_back_before_its_time_is_over(tiny, tmp_path, whole):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    (tools / "scontrol").chmod(0o755)
    env = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "tune",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    verb = ["fit", "--recipe", "digits-base", *sets(quick(tiny, tmp_path, "run", *SHORT)), "--resume"]
    first = Running(*verb, log=tmp_path / "first", env=env)
    first.until(lambda: newest_first(tmp_path / "run"))
    first.kill(signal.SIGUSR1)
    assert first.ended() == 128 + signal.SIGUSR1, first.said()
    assert "stopped by SIGUSR1" in first.said() and "Job 77 is requeued" in first.said()
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert not list((tmp_path / "run").rglob("hpc_ckpt*"))
    second = Running(*verb, log=tmp_path / "second", env=env)
    assert second.ended() == 0, second.said()
    same_end(whole, tmp_path / "run")
