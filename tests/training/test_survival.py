"""Runs that nothing ends badly: killed anywhere, on full disks, by damaged data, by bad steps, by their cluster."""

import csv
import io
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import sets
from forked import Running, together
from short_runs import losses, quick, states_equal

from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Layout
from zipar_train.data.shards import read_manifest, read_shard, write_shards
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.checkpoints import damage, newest_first
from zipar_train.run.metrics_csv import validations
from zipar_train.run.signals import Stopped
from zipar_train.training.callbacks.checkpoint import Checkpoint
from zipar_train.training.fit import fit
from zipar_train.training.guard import Guard
from zipar_train.training.module import ZipARModule

SHORT = [
    "data.micro_batch_size=4",
    "trainer.limit_train_batches=40",
    "trainer.check_val_every_n_epoch=1",
    "optim.ema_decay=0.9",
    "trainer.val_check_interval=8",
    "trainer.limit_val_batches=4",
    "checkpoint_every=2",
    "checkpoint_keep=2",
    "checkpoint_monitor=val/bits_w2",
]


def same_end(a: Path, b: Path) -> None:
    """Two runs' losses, weights, averages and optimizers are equal to the bit."""
    assert losses(a) == losses(b) and len(losses(a)) > 10
    one, two = read(a), read(b)
    assert states_equal(one.state, two.state)
    assert states_equal(one.extra["current_model_state"], two.extra["current_model_state"])
    optimizers = [saved.extra["optimizer_states"][0]["state"] for saved in (one, two)]
    assert all(torch.equal(optimizers[0][i][k], optimizers[1][i][k]) for i in optimizers[0] for k in optimizers[0][i])
    assert not states_equal(
        one.state, {k.removeprefix("model."): v for k, v in one.extra["current_model_state"].items()}
    )


@pytest.fixture(scope="module")
def whole(made_tiny, tmp_path_factory):
    """A run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    fit(load_recipe("digits-base", quick(made_tiny, folder, "whole", *SHORT)))
    return folder / "whole"


@pytest.mark.slow
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


def some(shards: Path, folder: Path, count: int) -> Path:
    """The digits' first training images as shards of 100, in a folder."""
    whole = read_manifest(shards / "train.json")
    samples = [s for shard in whole.shards for s in read_shard(shards / "train.json", shard, whole)]
    layout = {k: v for k, v in whole.model_dump().items() if k not in ("shards", "skipped")}
    write_shards(samples[:count], folder / "train.json", layout=Layout(**layout), per_shard=100)
    return folder


WAYS = {  # processes, images of a batch, more
    "one": (1, 16, []),
    "gathered": (1, 8, []),
    "two": (2, 8, []),
    "two gathered": (2, 4, []),
    "uneven": (2, 5, []),  # five do not divide eight: four at a time
}


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="optim.global_batch_size says how large a step is. Drop one"):
        load_recipe("digits-base", [*tiny, "optim.global_batch_size=64", "trainer.accumulate_grad_batches=2"])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


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
# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_what_is_there_and_training_goes_on(tiny, tmp_path, small_disk):
    """Filled in mid-run, and emptied again."""
    short = [o for o in SHORT if not o.startswith("checkpoint_monitor")]
    overrides = [*quick(tiny, tmp_path, "run", *short), f"run_dir={small_disk}/run", "trainer.max_epochs=6"]
    whole = quick(tiny, tmp_path, "whole", *short, "trainer.max_epochs=6")
    fit(load_recipe("digits-base", whole))
    running = Running("fit", "--recipe", "digits-base", *sets(overrides), log=tmp_path / "log")
    running.until(lambda: len(newest_first(small_disk / "run")) == 2)
    ballast = small_disk / "ballast"
    running.kill(signal.SIGSTOP)
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"0" * 4096):
                pass
        except OSError:
            pass
    running.kill(signal.SIGCONT)
    running.until(lambda: running.said().count("could not be written") >= 2)
    running.kill(signal.SIGSTOP)
    assert "No space left on device" in running.said() and "is as it was. Training goes on" in running.said()
    assert all(damage(path) is None for path in newest_first(small_disk / "run"))
    ballast.unlink()
    running.kill(signal.SIGCONT)
    assert running.ended() == 0, running.said()
    assert states_equal(read(tmp_path / "whole").state, read(small_disk / "run").state)
    assert losses(tmp_path / "whole") == losses(small_disk / "run")  # kept until there was room
    assert not list((small_disk / "run").rglob("*.part"))


def test_a_disk_that_stays_full_is_an_error_at_the_end(tiny, tmp_path, small_disk):
    (small_disk / "ballast").write_bytes(b"0" * (2**20 - 65536))
    overrides = [*quick(tiny, tmp_path, "run", *SHORT), f"run_dir={small_disk}/run", "trainer.max_epochs=1"]
    running = Running("fit", "--recipe", "digits-base", *sets(overrides), log=tmp_path / "log")
    assert running.ended() == 2
    assert "Make room and resume it" in running.said() and "Traceback" not in running.said()


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.fixture
def many(shards, tmp_path):
    """Eight shards of 100 training images, in a folder that may be damaged."""
    return some(shards, tmp_path / "many", 800)


def hurt(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:50000])
    else:
        data = bytearray(path.read_bytes())
        data[7000] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["deleted", "truncated", "flipped"])
def test_a_shard_damaged_in_mid_run_is_named_and_stops_or_is_skipped(tiny, many, tmp_path, monkeypatch, how, capsys):
    overrides = quick(
        tiny,
        tmp_path,
        "run",
        f"data.train={many}/train.json",
        "data.micro_batch_size=4",
        "data.shuffle=10",
        "trainer.max_epochs=1",
        "optim.global_batch_size=4",
        "trainer.limit_val_batches=1",
    )
    steps = ZipARModule.training_step

    def hurting(module, batch, batch_idx):
        if module.trainer.global_step == 62:
            left = {shard.name for shard in read_manifest(many / "train.json").shards} - set(seen)
            victim.append(sorted(left)[-1])
            hurt(many / victim[0], how)
        seen.update(key.partition("/")[0] for key in batch.keys)
        return steps(module, batch, batch_idx)

    seen: set[str] = set()
    victim: list[str] = []
    monkeypatch.setattr(ZipARModule, "training_step", hurting)
    with pytest.raises(ValueError, match="train-.*(damaged|cannot be read)") as stopped:
        fit(load_recipe("digits-base", overrides))
    assert victim[0] in str(stopped.value)

    seen.clear()
    monkeypatch.setattr(ZipARModule, "training_step", steps)
    skipping = [*overrides, "data.on_bad_sample=skip", f"run_dir={tmp_path}/skipping"]
    if how == "deleted":
        (many / victim[0]).write_bytes(b"")  # a manifest whose shards are missing is refused at the start
    fit(load_recipe("digits-base", skipping))
    said = capsys.readouterr().err
    assert victim[0] in said and "(100 samples)" in said
    found = losses(tmp_path / "skipping")
    assert len(found) == 200
    text = (tmp_path / "skipping" / "logs" / "version_0" / "metrics.csv").read_text().strip().split("\n")
    assert float(text[-2].split(",")[text[0].split(",").index("train/damaged")] or 100) == 100


def test_what_stands_in_for_damage_is_repeatable_and_whole(many, capsys):
    def seen(**more):
        loader = ShardLoader(many / "train.json", batch_size=8, shuffle=50, damaged="skip", **more)
        return [key for batch in loader for key in batch.keys], loader

    before, _ = seen()
    hurt(many / "train-000003.tar", "flipped")
    after, loader = seen()
    assert loader.damaged and sum(loader.damaged.values()) == 100
    assert len(after) == len(before) == 800
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert {a.partition("/")[0] for a, _ in changed} == {"train-000003.tar"} and len(changed) == 100
    assert "train-000003.tar" not in {key.partition("/")[0] for key in after}
    assert len({b for _, b in changed}) == 100  # different ones
    assert seen()[0] == after == seen(workers=2)[0]
    resumed = ShardLoader(many / "train.json", batch_size=8, shuffle=50, damaged="skip")
    resumed.load_state_dict({"epoch": 0, "steps": 40})
    assert [key for batch in resumed for key in batch.keys] == after[320:]
    for path in many.glob("*.tar"):
        hurt(path, "flipped") if path.name != "train-000003.tar" else None
    with pytest.raises(ValueError, match="none of its shards can be read"):
        seen()


def test_a_loader_that_stalls_is_told_and_one_that_dies_is_an_error(many, capfd, monkeypatch):
    from zipar_train.data import loader as loading

    def slow(*args, **kwargs):
        time.sleep(0.4)
        return read_shard(*args, **kwargs)

    monkeypatch.setattr(loading, "read_shard", slow)
    next(iter(ShardLoader(many / "train.json", batch_size=8, stalled=0.1)))
    assert "no batch for 0.1 s (epoch 0, batch 0)" in capfd.readouterr().err

    def dying(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(loading, "read_shard", dying)
    with pytest.raises(ValueError, match="a loader process died"):
        next(iter(ShardLoader(many / "train.json", batch_size=8, workers=1)))


# ---------------------------------------------------------------------------------------------------------------------
# Steps


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


# ---------------------------------------------------------------------------------------------------------------------
# Clusters


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
