"""Weights from run folders, checkpoints and exports into a family, every tensor accounted for."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zipar_train.models.family import Family, build
from zipar_train.recipe import load_recipe, parse
from zipar_train.sections import Model, Recipe


class Saved(NamedTuple):
    path: Path
    recipe: Recipe  # the one that made it
    state: dict[str, Tensor]  # by the names of the family's model
    extra: dict[str, Any]  # what else the file holds


def last_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint of a run folder, if it has one."""
    path = Path(run) / "checkpoints" / "last.ckpt"
    return path if path.is_file() else None


def read(path: str | Path) -> Saved:
    """Read a run folder, a `.ckpt` of one, or an exported folder.

    Nothing in the file is executed: `weights_only=True`, or safetensors.

    Raises:
        ValueError: naming the file, what is wrong and the remedy.
    """
    path = Path(path)
    if path.is_dir():
        if (checkpoint := last_checkpoint(path)) is not None:
            return read(checkpoint)
        if (path / "model.safetensors").is_file() and (path / "recipe.yaml").is_file():
            return _read_export(path)
        raise ValueError(
            f"{path} holds neither checkpoints/last.ckpt nor an export (model.safetensors and recipe.yaml). "
            "Train it first with `zipar-train fit`, or give another folder"
        )
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give a run folder, a .ckpt file or an exported folder that exists")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, BadZipFile, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} is not a readable checkpoint ({reason}). It is damaged, or holds more than tensors "
            "and plain data, which is refused"
        ) from error
    if not isinstance(content, dict) or "recipe" not in content or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of zipar-train: it carries no recipe")
    state = {name.removeprefix("model."): tensor for name, tensor in content.pop("state_dict").items()}
    return Saved(path, parse(content.pop("recipe"), where=f"{path}, its recipe"), state, content)


def _read_export(path: Path) -> Saved:
    try:
        state = load_file(path / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / 'model.safetensors'} is damaged ({error}). Export it again") from error
    return Saved(path, load_recipe(path / "recipe.yaml"), state, {})


def restore(family: Family, saved: Saved, model: Model) -> None:
    """Load saved weights into a family built from a recipe's model section.

    Raises:
        ValueError: if the weights belong to another model; lists what differs.
    """
    for key in ("family", "grid", "codes", "classes"):
        theirs, ours = getattr(saved.recipe.model, key), getattr(model, key)
        if theirs != ours:
            raise ValueError(
                f"{saved.path} is of another recipe ({saved.recipe.name}): its model.{key} is {theirs}, here it "
                f"is {ours}. Give a checkpoint of this recipe, or the recipe of this checkpoint"
            )
    wanted = family.model.state_dict()
    missing = sorted(wanted.keys() - saved.state.keys())
    surplus = sorted(saved.state.keys() - wanted.keys())
    shapes = [
        f"{name} is {list(saved.state[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted.keys() & saved.state.keys()
        if wanted[name].shape != saved.state[name].shape
    ]
    problems = [f"{title}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
                for title, names in (("missing", missing), ("surplus", surplus), ("of another shape", sorted(shapes)))
                if names]  # fmt: skip
    if problems:
        raise ValueError(
            f"{saved.path} does not fit the model of this recipe. " + "; ".join(problems) + ". "
            "Give a checkpoint of this recipe, or mend the recipe's depth, heads, width and feed_forward"
        )
    if saved.recipe.model != model:
        theirs = build(saved.recipe.model, device="meta").model.config.num_attention_heads
        ours = family.model.config.num_attention_heads
        if theirs != ours:  # which changes no tensor's shape
            raise ValueError(
                f"{saved.path} has {theirs} attention heads, the model of this recipe {ours}. Mend model.heads"
            )
    family.model.load_state_dict(saved.state)
