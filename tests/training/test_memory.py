"""The memory that is predicted, against what real steps take."""

import json
import os
import subprocess
import sys

import pytest
import torch
from commands import sets

from zipar_train.recipe.load import load_recipe
from zipar_train.training.memory_estimate import GIB, LiveBytes, advice, predict
from zipar_train.training.trainer import build_module

SHAPE = [
    "model.size=null",
    "model.num_layers=4",
    "model.num_heads=8",
    "model.hidden_size=512",
    "model.tokenizer=null",
    "model.tokenizer_weights=null",
    "model.num_classes=10",
    "trainer.precision=32-true",
    "tune.compile=false",
    "optim.ema_decay=null",
    "data.micro_batch_size=3",
]
LORA = ["model.weights=x", "tune.lora={rank: 8, alpha: 8, targets: [q_proj, v_proj]}"]
GLM_IMAGE = [  # adapters and their teacher, two grids, grouped queries
    "model.size=null",
    "model.num_layers=4",
    "model.num_heads=8",
    "model.num_kv_heads=2",
    "model.hidden_size=512",
    "model.tokenizer=null",
    "model.tokenizer_weights=null",
    "model.token_prompt={encoder: none, tokens: 64, vocabulary: 20000}",
    "trainer.precision=32-true",
    "tune.compile=false",
    "tune.attention=sdpa",
    "data.micro_batch_size=4",
    "model.grid=[16,16]",
    "model.preview=[8,8]",
    "zipar.windows={16: 1, 8: 1, 4: 1}",
    "evaluate.windows=[4]",
    "optim.global_batch_size=null",
]
QWEN = [  # all weights are trained; the embeddings, which are the head too, are a third of them
    *SHAPE[:-1],
    "model.num_classes=null",
    "model.num_kv_heads=2",
    "model.grid=[16,16]",
    "model.codebook_size=8192",
    "model.token_prompt={encoder: none, tokens: 16, vocabulary: 16384}",
    "zipar.windows={16: 1, 8: 1, 4: 1}",
    "evaluate.windows=[4]",
    "model.weights=null",
    "tune.lora=null",
    "tune.attention=sdpa",
    "tune.activation_checkpointing=false",
    "optim.global_batch_size=null",
    "data.micro_batch_size=4",
]
MEASURE = """
import re, sys, torch
from zipar_train.data.batch import Batch
from zipar_train.models.family import build, conditions
from zipar_train.recipe.load import load_recipe
from zipar_train.training.trainer import module_of
recipe = load_recipe(sys.argv[1], sys.argv[2:])
def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def step(module, family, images):
    codes = torch.randint(family.codebook_size, (images, family.grid.num_codes))
    condition = family.check(conditions(recipe.model, images))
    taught = recipe.tune.distill > 0
    loss, divergence = module.losses(Batch(codes, condition), condition, min(recipe.zipar.windows), with_teacher=taught)
    (loss + divergence if taught else loss).backward()
less = {"num_layers": 1, "num_heads": 1, "num_kv_heads": None, "hidden_size": 8, "grid": [2, 2]}
small = recipe.model.model_copy(update=less)
warm = build(small)  # what libraries take at their first use
torch.optim.AdamW(warm.model.parameters()).step()
open("/proc/self/clear_refs", "w").write("5")
before = most()
family = build(recipe.model)
teacher = build(recipe.model) if recipe.tune.distill and not recipe.tune.lora else None
module = module_of(recipe, family, teacher)
family.model.train()
optimizer = module.optimizer()
for _ in range(2):
    step(module, family, recipe.data.micro_batch_size)
    optimizer.step()
    optimizer.zero_grad()
print(most() - before)
"""


@pytest.mark.slow(seconds=25)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("llamagen-l", [*SHAPE, "tune.distill=0"]),
        ("llamagen-l", [*SHAPE, "tune.distill=0.8"]),
        ("llamagen-l", [*SHAPE, *LORA, "tune.activation_checkpointing=true"]),
        ("glm-image", GLM_IMAGE),
        ("simplear-0.5b-1024", [*QWEN, "tune.distill=0"]),
        ("janus-pro-1b", [*QWEN, "model.num_kv_heads=null", "tune.distill=0"]),
    ],
)
def test_a_step_takes_what_was_predicted(recipe, overrides):
    """In a process of its own, whose allocator gives back at once what is freed: it wastes nothing then."""
    found = predict(load_recipe(recipe, overrides)).train
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, recipe, *overrides], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout)
    assert abs(found.total / measured - 1) < 0.1, (found, measured)


def test_counts_are_of_what_is_alive():
    alive = LiveBytes()
    with alive:
        a = torch.zeros(1000)
        b = a + a
        assert (alive.now, alive.most) == (8000, 8000)
        a.view(10, 100).add_(1)  # no memory of its own
        del b
        assert alive.now == 4000
        torch.zeros(500)
    assert (alive.now, alive.most) == (4000, 8000)


@pytest.mark.slow
def test_numbers_follow_the_recipe():
    def of(*overrides):
        return predict(
            load_recipe(
                "llamagen-b", ["trainer.precision=bf16-mixed", "data.micro_batch_size=2", "tune.distill=0", *overrides]
            )
        )

    plain = of("optim.ema_decay=null")
    count = plain.parameters
    assert plain.trained == count == 110_888_448  # LlamaGen-B, as published
    assert 0 <= plain.train.weights - 4 * count < 1e6  # and tables of frequencies
    assert plain.train.gradients == 4 * count and abs(plain.train.optimizer - 8 * count) < 4096
    assert of("optim.ema_decay=0.99").train.average == plain.train.weights
    assert of("tune.activation_checkpointing=true").train.activations < 0.5 * plain.train.activations
    more = of("optim.ema_decay=null", "data.micro_batch_size=4").train
    assert 1.5 < more.activations / plain.train.activations < 2.2
    adapters = of(*LORA)
    assert adapters.train.weights < 0.6 * plain.train.weights  # bfloat16
    assert adapters.trained == 12 * 2 * 2 * 8 * 768 and adapters.train.gradients == 4 * adapters.trained
    taught = of("model.weights=x", "tune.distill=0.5").train
    assert taught.teacher == plain.train.weights and plain.train.teacher == 0
    assert of(*LORA, "tune.distill=0.5").train.teacher == 0  # the model without its adapters teaches
    drawn = plain.generation
    assert (
        drawn.cache == 2 * 2 * drawn.images * 12 * 598 * 768 * 2
    )  # rows, keys and values, layers, slots, width, bytes


@pytest.mark.slow
def test_advice_makes_it_fit():
    overrides = ["data.micro_batch_size=16", "evaluate.batch_size=200", "trainer.precision=bf16-mixed"]
    recipe = load_recipe("llamagen-b", [*overrides, "tune.distill=0"])
    found, room = predict(recipe), 6 * GIB
    told = advice(recipe, found, room)
    assert len(told) == 2 and advice(recipe, found, 1000 * GIB) == []
    changes = [word.rstrip(".,") for line in told for word in line.split() if "batch_size=" in word]
    mended = load_recipe("llamagen-b", [*overrides, "tune.distill=0", *changes])
    assert advice(mended, predict(mended), room) == []


@pytest.mark.slow
def test_advice_spares_the_teacher_where_that_is_enough():
    recipe = load_recipe("llamagen-b", ["data.micro_batch_size=1", "tune.activation_checkpointing=true"])
    found = predict(recipe)
    assert found.train.teacher > 0.1 * found.train.total
    (told,) = advice(recipe, found, found.train.total - found.train.teacher // 2)
    assert "--set tune.distill=0" in told
    assert "--set tune.distill=0" not in str(advice(recipe, found, found.train.total - 2 * found.train.teacher))


@pytest.mark.slow
def test_the_plan_tells_memory(run, tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["plan", "--recipe", "llamagen-l", *sets([*SHAPE, "data.micro_batch_size=64"])]
    status, out, err = run(*arguments, "--device-memory", "8", "--json", file)
    assert status == 0, err
    memory = json.loads(file.read_text())["memory"]
    assert memory["train"]["images"] == 64 and memory["parameters"] > 1e7
    assert "Try --set data.micro_batch_size=" in out and memory["advice"]
    assert "It fits into 800.0 GiB." in run(*arguments, "--device-memory", "800")[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["tune.activation_checkpointing=true"]])
def test_fsdp_shares_what_is_kept(more):
    def of(*overrides):
        return predict(load_recipe("llamagen-l", [*SHAPE, *more, *overrides])).train

    alone, few, many = of(), *(of("trainer.strategy=fsdp", f"trainer.devices={n}") for n in (2, 64))
    unit = 4 * 16384 * 512  # the output head; the embedding has 11 rows more
    for shared, devices in ((few, 2), (many, 64)):
        assert abs(shared.weights - (alone.weights / devices + 2 * unit)) < 2 * 4 * 12 * 512
        assert abs(shared.optimizer - alone.optimizer / devices) < 8
        assert abs(shared.gradients - alone.gradients / devices) < 8
        assert shared.activations == alone.activations
        assert shared.total >= shared.weights + shared.optimizer + shared.activations
    assert many.total < few.total < alone.total


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bytes"), [("32", 4), ("bf16-mixed", 4), ("bf16-true", 2), ("64-true", 8)])
def test_weights_are_of_lightnings_precision(kind, bytes):
    recipe = load_recipe("llamagen-l", [*SHAPE, f"trainer.precision={kind}", "tune.distill=0"])
    found = predict(recipe)
    assert abs(found.train.weights / found.parameters - bytes) < 0.1
    assert {
        p.dtype.itemsize
        for p in build_module(
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})
        ).parameters()
    } == {bytes}


@pytest.mark.slow
def test_short_names_of_precisions_are_the_long():
    short, long = (
        predict(load_recipe("llamagen-l", [*SHAPE, f"trainer.precision={kind}"])).train
        for kind in ("bf16", "bf16-mixed")
    )
    assert short == long
