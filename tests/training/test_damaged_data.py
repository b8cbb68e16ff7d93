"""Shards damaged in mid-run are named and stop the run or are skipped; loaders that stall or die are told."""

import os
import signal
import time
from pathlib import Path

import pytest
from short_runs import losses, quick, some

from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit
from zipar_train.training.module import ZipARModule


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="none of its shards of 8 x 8 codes can be read"):
        seen()


def test_a_loader_that_stalls_is_told_and_one_that_dies_is_an_error(many, capfd, monkeypatch):
    from zipar_train.data import epoch as loading

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
