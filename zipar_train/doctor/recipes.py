"""Checks of recipes: the shipped ones can be read, and a given one can run on this machine."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from zipar_train.doctor.checks import Check, CheckContext, CheckResult, note, ok, problem, size
from zipar_train.doctor.devices import available, bf16_speed, device
from zipar_train.doctor.disk import existing_parent
from zipar_train.recipe.load import load_recipe, recipe_folder, shipped
from zipar_train.recipe.schema import Recipe

NEAR = 0.9  # usable share of a device's memory; the rest is for allocators and libraries
ELSEWHERE = "--set run_dir=FOLDER writes elsewhere"
WHOLE = "--set trainer.precision=32-true"


def every(asked: CheckContext) -> Iterator[CheckResult]:
    names, failed = shipped(), 0
    for name in names:
        try:
            load_recipe(name)
        except ValueError as error:
            failed += 1
            yield problem(name, str(error), "Fix the file, or set the environment variable that it names")
    if not names:
        yield problem("shipped", f"none in {recipe_folder()}", "pip install --force-reinstall zipar-train")
    elif not failed:
        yield ok("shipped", f"{len(names)}, all in order, in {recipe_folder()}")


def given(asked: CheckContext) -> Recipe:
    assert asked.recipe is not None
    return asked.recipe


def run_folder(asked: CheckContext) -> Iterator[CheckResult]:
    """Check the run folder for anything that `fit` would reject."""
    from zipar_train.models.restore import read
    from zipar_train.run.checkpoints import last_checkpoint
    from zipar_train.training.fit import blocking_changes

    recipe = given(asked)
    run = Path(recipe.run_dir)
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        yield ok("run", f"{run}, a new run: {'no checkpoint is in it' if run.exists() else 'not there yet'}")
        return
    saved = read(checkpoint)
    if saved.recipe is None:
        yield problem("run", f"{checkpoint} carries no recipe: it is not a run of zipar-train", ELSEWHERE)
    elif changed := blocking_changes(saved.recipe, recipe):
        yield problem("run", f"{run} was made by another recipe: {'; '.join(changed)}", ELSEWHERE)
    else:
        step = saved.extra.get("global_step", "unknown")
        yield note("run", f"{run} holds this recipe's run, at step {step}", f"--resume continues it; {ELSEWHERE}")


def trainer(asked: CheckContext) -> Iterator[CheckResult]:
    """Build Lightning's Trainer as `fit` does; it rejects devices that the machine does not have."""
    from zipar_train.training.trainer import build_trainer

    try:
        made = build_trainer(given(asked))
    except ValueError as error:
        remedy = "Ask for what is here: --set trainer.devices=1, --set trainer.accelerator=auto"
        yield problem("trainer", f"Lightning refuses the recipe's: {error.__cause__ or error}", remedy)
        return
    where = type(made.accelerator).__name__.removesuffix("Accelerator")
    strategy = type(made.strategy).__name__.removesuffix("Strategy")
    yield ok("trainer", f"{made.num_devices} x {where}, {strategy}, precision {made.precision}")


def precisions(asked: CheckContext) -> Iterator[CheckResult]:
    import torch

    from zipar_train.training.trainer import precision

    kind, place = precision(given(asked)), device(asked)
    dtype = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(kind.split("-")[0], torch.float32)
    if place.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        lacking = f"{kind}, and {torch.cuda.get_device_name()} has no bfloat16"
        yield problem("precision", lacking, f"--set trainer.precision=16-mixed, or {WHOLE}")
        return
    value = torch.ones(64, 64, device=place, dtype=dtype, requires_grad=True)
    (value @ value).sum().backward()
    if place.type == "cpu" and dtype == torch.bfloat16 and (ratio := bf16_speed()) < 1:
        yield note("precision", f"{kind}: on this CPU {ratio:.2f} times as fast as float32", WHOLE)
    else:
        yield ok("precision", f"{kind}, tried on the {'GPU' if place.type == 'cuda' else 'CPU'}")


def memory(asked: CheckContext) -> Iterator[CheckResult]:
    import torch

    from zipar_train.training.memory_estimate import advice, predict
    from zipar_train.training.trainer import devices, weights_dtype

    recipe = given(asked)
    found = predict(recipe)
    room, whose = float(available()), "free on this machine"
    if device(asked).type == "cuda":
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        room, whose = min(sizes), "of a GPU"
    lines = advice(recipe, found, NEAR * room)
    for name, needed in (("training", found.train), ("generation", found.generation)):
        what = f"{size(needed.total)} of {size(room)} {whose}, {needed.images} images at once"
        how = [line.partition("Try ")[2].rstrip(".") for line in lines if line.lower().startswith(name)]
        if not how:
            yield ok(f"memory, {name}", what)
        elif needed.total > room and name == "training":
            yield problem(f"memory, {name}", what, how[0])
        else:
            yield note(f"memory, {name}", what, how[0])
    sharing = devices(recipe) if recipe.trainer.get("strategy") == "fsdp" else 1
    weights = found.trained * weights_dtype(recipe).itemsize
    once = weights * (2 if recipe.optim.ema_decay else 1) + found.train.optimizer * sharing
    free = shutil.disk_usage(existing_parent(Path(recipe.run_dir))).free
    what = f"some {size(once)}, twice that while one replaces another; {size(free)} free"
    remedy = "Make room, or --set run_dir=FOLDER on another disk"
    yield ok("checkpoint", what) if 2 * once < free else problem("checkpoint", what, remedy)


SHIPPED = (Check("shipped", every, "pip install --force-reinstall zipar-train"),)
CHECKS = (
    Check("run", run_folder, f"It is damaged, or no run folder: {ELSEWHERE}"),
    Check("trainer", trainer, "Fix the recipe's section `trainer`"),
    Check("precision", precisions, WHOLE),
)
MEMORY = (Check("memory", memory, "zipar-train plan --recipe NAME reports it too"),)
