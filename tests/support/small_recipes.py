"""Shipped recipes at a small size under their own names, and the files with which the documentation's commands work."""

from pathlib import Path

from commands import TINY, picture

from zipar_train.recipe import load
from zipar_train.recipe.load import dump, load_recipe

SHORT = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1",
    "trainer.accelerator=cpu",
    "evaluate.images=10",
    "evaluate.batch_size=10",
    "evaluate.seeds=[0]",
    "log.wandb=disabled",
]
CLASSES = 361  # of the pages' labels 360 is the highest
LLAMAGEN = [
    *SHORT,
    "model.size=null",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.hidden_size=24",
    "model.ffn_size=48",
    "model.codebook_size=24",
    "model.grid=[4,24]",
    f"model.num_classes={CLASSES}",
    "model.tokenizer=palette",  # pixels of 24 grey levels: VQ-16 takes half a second for an image of 384 px
    "model.tokenizer_weights=null",
    "data.micro_batch_size=2",
    "data.workers=0",
    "optim.global_batch_size=4",
    "trainer.val_check_interval=1.0",
    "trainer.precision=32-true",
    "tune.compile=false",
    "evaluate.windows=[24,3]",
    "evaluate.features=classifier",
    "evaluate.resize_to=null",
    "evaluate.reference=null",
]
WEIGHTS = {"llamagen-b": "c2i_B_384.pt", "llamagen-l": "c2i_L_384.pt"}


def write_recipes(folder: Path) -> None:
    """Write the recipes of digits and of two LlamaGens."""
    for name in ("digits", "digits-base"):
        (folder / f"{name}.yaml").write_text(dump(load_recipe(name, [*TINY, *SHORT])))
    for name, weights in WEIGHTS.items():
        (folder / f"{name}.yaml").write_text(dump(load_recipe(name, [*LLAMAGEN, f"model.weights={weights}"])))


def write_weights(path: Path) -> None:
    """Random weights of the small LlamaGens, as their authors publish them."""
    import original
    import torch

    state = original.random_gpt(depth=1, width=24, codes=24, grid=24, classes=CLASSES, dtype=torch.float32)
    torch.save({"model": state}, path)


def write_pictures(folder: Path, *, classes: int, train: int = 1, val: int = 1) -> None:
    """A folder of pictures by split and class, as many of each class as given."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                picture(label * count + i).save(folder / split / str(label) / f"{i}.png")


def use(folder: Path) -> None:
    """Let this process find the recipes of `folder` in place of the shipped ones."""
    load.recipe_folder = lambda: folder
