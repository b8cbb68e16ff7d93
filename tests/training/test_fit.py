"""Training: repeatable, its loss and optimizer by their definitions; refusals with a remedy; modules usable alone."""

import csv
import shutil
from collections import Counter
from math import log
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from commands import sets
from families import llamagen
from short_runs import losses, quick, states_equal

from zipar_train import Plan, ShardDataModule, ZipARModule, load
from zipar_train.data.batch import Batch
from zipar_train.data.loader import ShardLoader
from zipar_train.decoding.generator import Generator
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.training.callbacks.throughput import flops
from zipar_train.training.fit import fit
from zipar_train.training.trainer import build_trainer


@pytest.mark.slow
def test_same_seed_same_losses_and_the_loss_falls(tiny, tmp_path):
    runs = []
    for name in ("a", "b", "c"):
        seed = "seed=1" if name == "c" else "seed=0"
        fit(load_recipe("digits-base", quick(tiny, tmp_path, name, seed, "optim.lr=1e-2")))
        runs.append(losses(tmp_path / name))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(runs[0]) == 90
    early, late = [sum(list(runs[0].values())[part]) / 10 for part in (slice(0, 10), slice(80, 90))]
    assert late < 0.8 * early
    assert states_equal(read(tmp_path / "a").state, read(tmp_path / "b").state)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_stops_the_run_with_its_name(tiny, tmp_path, cli, shards, workers):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    data = bytearray((copy / "train-000000.tar").read_bytes())
    data[5000] ^= 1
    (copy / "train-000000.tar").write_bytes(data)
    done = cli(
        "fit", "--recipe", "digits-base", *sets([*tiny, f"data.train={copy}/train.json", f"data.workers={workers}"])
    )
    assert done.returncode == 2, done.stderr
    assert "train-000000.tar is damaged" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_tuning_starts_from_the_base_and_bits_are_what_validation_logs(tiny, tmp_path):
    fit(load_recipe("digits-base", quick(tiny, tmp_path, "base")))
    tuned = load_recipe("digits", quick(tiny, tmp_path, "tuned", f"model.weights={tmp_path}/base", "optim.lr=1e-12"))
    fit(tuned)
    base, after = read(tmp_path / "base").state, read(tmp_path / "tuned").state
    assert all(torch.allclose(base[k], after[k], atol=1e-8) for k in base)
    from zipar_train.evaluation.likelihood import bits_per_code

    generator = load(tmp_path / "tuned")
    rows = list(csv.DictReader((tmp_path / "tuned" / "logs" / "version_0" / "metrics.csv").open()))
    logged = [row for row in rows if row.get("val/bits_w4")][-1]
    for window in (8, 4, 2):
        exact = bits_per_code(
            generator.inference_family, generator.plan(window), ShardLoader(tuned.data.val, batch_size=50)
        )
        assert abs(exact - float(logged[f"val/bits_w{window}"])) < 1e-5


def test_windows_come_in_their_shares_and_dropout_in_its():
    module = ZipARModule(llamagen(6, 6), windows={6: 1, 3: 2, 1: 1}, label_dropout=0.25, seed=3)
    for epoch in (0, 1):
        counts = Counter(module.sample_window(epoch, batch) for batch in range(40))
        assert abs(counts[6] - 10) <= 1
        assert abs(counts[3] - 20) <= 1
        assert abs(counts[1] - 10) <= 1
    assert [module.sample_window(0, b) for b in range(40)] != [module.sample_window(1, b) for b in range(40)]
    drops = torch.stack([module.sample_dropout(0, step, range(50)) for step in range(200)])
    assert abs(drops.float().mean() - 0.25) < 0.02
    assert torch.equal(module.sample_dropout(0, 7, range(20, 40)), drops[7][20:40])


def test_an_image_is_treated_alike_for_any_number_of_devices():
    module, seen = ZipARModule(llamagen(6, 6), windows={6: 1}), {}
    for ranks, parts in ((1, 1), (2, 1), (2, 2), (1, 4)):
        images = 8 // ranks // parts
        found = {}
        for rank in range(ranks):
            for batch in range(3 * parts):
                module._trainer = SimpleNamespace(accumulate_grad_batches=parts, global_rank=rank)
                step, places = module.places(batch, images)
                drops = module.sample_dropout(1, step, places).tolist()
                found |= {(step, place): drop for place, drop in zip(places, drops, strict=True)}
        seen[ranks, parts] = found
    assert len({tuple(sorted(found.items())) for found in seen.values()}) == 1 and len(found) == 24


def test_the_loss_is_the_mean_over_codes_and_gradients_reach_every_weight():
    family = llamagen(4, 4)
    module = ZipARModule(family, windows={2: 1})
    batch = Batch(torch.randint(7, (5, 16)), torch.tensor([0, 1, 2, 0, 1]))
    module.sample_dropout = lambda *_: torch.tensor([True, False, False, False, False])
    module.sample_window = lambda *_: 2
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    module._trainer = SimpleNamespace(
        current_epoch=0,
        global_rank=0,
        accumulate_grad_batches=1,
        global_step=0,
        precision="32-true",
        loggers=[],
        strategy=SimpleNamespace(reduce=lambda loss, reduce_op: loss),
    )
    loss = module.training_step(batch, 0)
    from zipar_train.models.family import teacher_forced
    from zipar_train.plan.masks import dense

    plan = Plan.zipar(family.grid, window=2)
    log_p = teacher_forced(family, plan, batch.codes, torch.tensor([3, 1, 2, 0, 1]), dense(plan)).log_softmax(-1)
    assert torch.allclose(loss, -log_p.gather(-1, batch.codes[..., None]).mean())
    assert loss > 0.3 * log(7)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in family.model.parameters())
    module.on_before_optimizer_step(module.optimizer())
    assert logged["train/loss"] == float(loss.detach())
    norm = torch.cat([p.grad.flatten() for p in family.model.parameters()]).norm()
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_only_matrices_decay_and_the_schedule_warms_up_and_ends_at_zero(tiny_recipe):
    module = ZipARModule(llamagen(8, 8, codes=17, classes=10), windows={8: 1}, lr=1e-2, weight_decay=0.1, warmup=0.5)
    rates = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = L.Trainer(
        max_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        callbacks=[Watch()],
        limit_val_batches=0,
    )
    data = ShardDataModule(tiny_recipe.data.train, tiny_recipe.data.val, batch_size=8)
    module.to(torch.float32)
    trainer.fit(module, data)
    assert rates[4] == pytest.approx(1e-2)
    assert rates[0] < rates[2] < rates[4] > rates[7] > rates[9]
    assert rates[9] == pytest.approx(0, abs=1e-9)
    decay, rest = trainer.optimizers[0].param_groups
    assert {p.ndim for p in decay["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_arguments_that_lightning_refuses_are_named(tiny):
    with pytest.raises(ValueError, match="trainer: Lightning refuses") as refused:
        build_trainer(load_recipe("digits-base", [*tiny, "trainer.accelerator=tpu"]))
    assert len(str(refused.value)) < 300


def test_a_step_of_more_images_than_there_are_is_refused(tiny):
    with pytest.raises(
        ValueError, match=r"train.json has [\d,]+ images, and a step takes 5,000: lower optim.global_batch_size"
    ):
        fit(load_recipe("digits-base", [*tiny, "optim.global_batch_size=5000"]))


def test_memory_that_runs_out_is_told_with_a_remedy(tiny, monkeypatch):
    def losses(self, *arguments):
        return torch.empty(2**60, dtype=torch.uint8)  # the allocator's own failure

    monkeypatch.setattr(ZipARModule, "losses", losses)
    with pytest.raises(
        ValueError, match="memory ran out with 8 images on a device at once. Lower data.micro_batch_size"
    ):
        fit(load_recipe("digits-base", [*tiny, "data.micro_batch_size=8"]))


@pytest.mark.slow
def test_a_generator_of_trained_weights_equals_the_trained_module(tiny_recipe):
    """Through the checkpoint and back: the same logits."""
    fit(tiny_recipe.model_copy(update={"trainer": {**tiny_recipe.trainer, "max_epochs": 1}}))
    saved = read(tiny_recipe.run_dir)
    first, second = Generator(tiny_recipe, saved), load(tiny_recipe.run_dir)
    a, b = first.generate([1, 2, 3], window=2), second.generate([1, 2, 3], window=2)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.pixels, b.pixels)


@pytest.mark.parametrize("taught", [False, True])
def test_operations_are_those_that_torch_counts(taught):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    family = llamagen(4, 4)
    plan = Plan.zipar(family.grid, window=2)
    batch = Batch(torch.randint(7, (1, 16)), torch.tensor([0]))
    module = ZipARModule(family, windows={2: 1}, teacher=llamagen(4, 4) if taught else None, distill=0.5 * taught)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(x for x in module.losses(batch, batch.condition, 2, with_teacher=taught) if x is not None).backward()
    found = flops(family, plan, teacher=module.plans.plan(4) if taught else None)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)
