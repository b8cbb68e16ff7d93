"""Fair timing: nothing is set up in a counted round, what fails or does not fit leaves the rest, a step is fit's."""

import json

import graphs
import lightning as L
import pytest
import torch
from commands import sets
from small import TINY
from torch.utils.data import DataLoader

from zipar_train import Plan
from zipar_train.benchmark import decode, decoders, rows, train, train_step
from zipar_train.benchmark.decode import bench_decode, in_groups
from zipar_train.benchmark.random_family import random_family
from zipar_train.benchmark.results import EAGER, OURS, PLAIN, SDPA, STOCK
from zipar_train.benchmark.turns import MOST_WARM_UPS, Way, take_turns
from zipar_train.cli import bench as bench_cli
from zipar_train.data.batch import Batch
from zipar_train.decoding import memory
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.memory import decode_bytes
from zipar_train.recipe.load import load_recipe
from zipar_train.training.trainer import module_of

pytestmark = pytest.mark.usefixtures("known_rates")


def test_runs_that_set_something_up_are_not_counted():
    """Compilations and captures, whenever they happen; a way that fails is run no more."""
    runs = {"compiles twice": 0, "captures late": 0, "is ready": 0, "fails": 0, "never settles": 0}

    def run(name):
        runs[name] += 1
        if name == "compiles twice" and runs[name] <= 2:
            torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1
        if name == "fails" and runs[name] == 3:
            raise torch.OutOfMemoryError("no memory left\nat all")

    released = []
    ways = {name: Way(lambda name=name: run(name), release=lambda name=name: released.append(name)) for name in runs}
    ways["captures late"] = Way(lambda: run("captures late"), lambda: runs["captures late"] > 3)
    ways["never settles"] = Way(lambda: run("never settles"), lambda: False)
    seen = []
    timed = take_turns(
        ways, rounds=3, device=torch.device("cpu"), after=lambda timed: seen.append(len(timed["is ready"].times))
    )
    assert {name: one.warm_ups for name, one in timed.items()} == {
        "compiles twice": 3,
        "captures late": 4,
        "is ready": 1,
        "fails": 1,
        "never settles": MOST_WARM_UPS,
    }
    assert [len(one.times) for one in timed.values()] == [3, 3, 3, 1, 0]
    assert timed["fails"].failure.error == "OutOfMemoryError: no memory left"
    assert "raise torch.OutOfMemoryError" in timed["fails"].failure.trace
    assert "still compiling or capturing after 6 runs" in timed["never settles"].failure.error
    assert runs["fails"] == 3 and released == ["fails"]
    assert seen == [1, 2, 3]


@pytest.fixture
def recorder(monkeypatch):
    """CUDA graphs that work on the CPU, by default for every Decoder."""
    graphs.install(monkeypatch)
    monkeypatch.setattr(Decoder.__init__, "__kwdefaults__", {"released": False, "capture": True})
    return graphs.Graph


def test_no_graph_is_captured_in_a_counted_round(monkeypatch, recorder):
    """The prompt's pass occurs once an image: it is captured in the second one."""
    recorded = []
    report = bench_decode(
        load_recipe("digits", TINY),
        windows=[8, 2],
        batches=[2],
        rounds=2,
        baselines=False,
        progress=False,
        save=lambda report: recorded.append(recorder.recorded),
    )
    assert recorded[0] > 0 and len(set(recorded)) == 1
    assert [row.warm_ups for row in report.rows] == [2, 2]


@pytest.mark.slow
def test_a_way_that_fails_leaves_the_rows_of_others(run, tmp_path, monkeypatch):
    real = decoders.eager_loop

    def scarce(*args, window, **kwargs):
        if window == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return real(*args, window=window, **kwargs)

    monkeypatch.setattr(decoders, "eager_loop", scarce)
    options = sets(TINY)
    status, out, _ = run(
        "bench",
        "--recipe",
        "digits",
        *options,
        "--windows",
        "8,2",
        "--repeats",
        "1",
        "--batch-sizes",
        "1,10000000000",
        "--json",
        tmp_path / "b.json",
    )
    assert status == 1
    assert "not measured: eager loop, as released, window 2, batch 1, 8x8: OutOfMemoryError: CUDA out of memory" in out
    assert "not measured: zipar-train, window 8, batch 10000000000, 8x8: 10,000,000,000 images at once need" in out
    report = json.loads((tmp_path / "b.json").read_text())
    assert [(row["method"], row["window"]) for row in report["rows"]] == [
        (OURS, 8),
        (PLAIN, 8),
        (EAGER, 8),
        (STOCK, 8),
        (OURS, 2),
        (PLAIN, 2),
    ]
    assert [(f["method"], f["window"]) for f in report["failures"]] == [(EAGER, 2), (OURS, 8), (OURS, 2)]


@pytest.mark.slow
def test_a_step_that_fails_leaves_the_rows_of_others(run, tmp_path, monkeypatch):
    def scarce(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(train_step.ZipARModule, "losses", scarce)
    options = sets(TINY)
    arguments = [
        "bench",
        "--train",
        "--recipe",
        "digits",
        *options,
        "--batch-sizes",
        "2",
        "--repeats",
        "1",
        "--json",
        tmp_path / "t.json",
    ]
    status, out, _ = run(*arguments)
    assert status == 1
    assert "not measured: sdpa, window 1, batch 2, 8x8: OutOfMemoryError: CUDA out of memory" in out
    report = json.loads((tmp_path / "t.json").read_text())
    assert [row["attention"] for row in report["rows"]] == ["causal"]
    monkeypatch.setattr(train_step, "causal", scarce)
    status, _, err = run(*arguments)
    assert status == 2 and "CUDA out of memory" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb",
    [
        {"batch_sizes": "1,2", "windows": "8", "alone": True},
        {"batch_sizes": "1,2", "rows": "4", "alone": True},
        {"train": True},
        {"grids": "8,4", "windows": "4"},
    ],
)
def test_a_bench_that_is_killed_leaves_its_rows(tmp_path, monkeypatch, verb):
    """In its second group of rows, here: the file holds what was measured by then, whole."""
    real, calls = decode.take_turns, []

    def killed(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args, **kwargs)

    for module in (decode, rows, train):
        monkeypatch.setattr(module, "take_turns", killed)
    said = {"windows": None, "batch_sizes": None, "grids": None, "rounds": 1, "alone": False} | verb
    with pytest.raises(KeyboardInterrupt):
        bench_cli.bench("digits", overrides=TINY, json_file=tmp_path / "b.json", **said)
    left = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(left) == (3 if "grids" in verb else 1)


@pytest.mark.slow
def test_ways_that_do_not_fit_together_take_turns_in_groups(monkeypatch):
    assert in_groups({"a": 5, "b": 4, "c": 2, "d": 11, "e": 1}, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    recipe = load_recipe("digits", TINY)
    family = random_family(recipe.model, [8, 8], seed=recipe.seed, dtype=torch.float32, device=torch.device("cpu"))
    plan = Plan.zipar(family.grid, window=2, **recipe.zipar.rule)
    one = decode_bytes(family, plan, 2, rows=4, slots=len(plan))
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(one * 1.3))
    report = bench_decode(recipe, windows=[8, 2], batches=[2], rounds=1, progress=False)
    assert len(report.rows) == 7 and not report.failures
    assert any("memory does not hold all methods at once" in note for note in report.notes)


def test_a_measured_step_is_a_step_of_fit(tmp_path):
    """The same weights afterwards: the same loss, clipping, decay and optimizer."""
    recipe = load_recipe(
        "digits",
        [
            *TINY,
            "optim.schedule=constant",
            "optim.warmup=0",
            "optim.lr=0.1",
            "optim.weight_decay=0.3",
            "optim.betas=[0.5, 0.6]",
            "data.label_dropout=0",
            "trainer.gradient_clip_val=0.01",
            "trainer.accelerator=cpu",
        ],
    )
    settings = train._settings(recipe, [8, 8], 2, compiled=False)
    made = train_step.TrainingStep(settings, train_step.Case(SDPA, (8, 8), 2, 3), "32-true", torch.device("cpu"))
    made()
    family = random_family(settings.model, [8, 8], seed=settings.seed, dtype=torch.float32, device=torch.device("cpu"))
    start = {name: tensor.clone() for name, tensor in family.model.state_dict().items()}
    module = module_of(settings, family)
    batch = Batch(made.codes, made.condition, ["a", "b", "c"])
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        barebones=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.01,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    for name, tensor in family.model.state_dict().items():
        assert torch.allclose(made.module.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7), name
        assert not torch.equal(tensor, start[name]) or not tensor.requires_grad
