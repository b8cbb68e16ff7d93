"""Weights from run folders, checkpoints, exports and published files into a family, every tensor accounted for."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipar_train.checkpoints import last_checkpoint
from zipar_train.models import layout, lora
from zipar_train.models.family import Family, build
from zipar_train.models.published import find, read_file, read_folder, tensors, unaccounted
from zipar_train.recipe import load_recipe, parse
from zipar_train.sections import Model, Recipe


class Saved(NamedTuple):
    path: Path
    recipe: Recipe | None  # the one that made it; None: published by others
    state: dict[str, Tensor]  # by the names of the family's model, or by LlamaGen's; mapped from the file
    extra: dict[str, Any]  # what else the file holds

    @property
    def adapter(self) -> bool:
        """Whether these are low-rank adapters alone, which need the weights that their recipe started from."""
        return self.recipe is not None and self.recipe.tune.lora is not None and all(lora.MARK in n for n in self.state)


def read(source: str | Path, *, entry: str | None = None) -> Saved:
    """Read a run folder, a `.ckpt` of one, an exported folder, or a published file; on disk or on the hub.

    Nothing in the file is executed: `weights_only=True`, or safetensors.

    Args:
        source: a path, `owner/repo:file`, or `owner/repo:` for a checkpoint in transformers' layout.
        entry: of a published `.pt`, see `model.weights_entry` in the recipe.

    Raises:
        ValueError: naming the file, what is wrong and the remedy.
    """
    path = find(source)
    if path.is_dir():
        if (checkpoint := last_checkpoint(path)) is not None:
            return read(checkpoint)
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (path / name).is_file() and (path / "recipe.yaml").is_file():
                state = {_lora_name(key): tensor for key, tensor in read_file(path / name).items()}
                extra = {"base": (path / "base").read_text()} if (path / "base").is_file() else {}
                return Saved(path, load_recipe(path / "recipe.yaml"), state, extra)
        if (path / "config.json").is_file():  # in transformers' layout: published, or an export of several files
            recipe = load_recipe(path / "recipe.yaml") if (path / "recipe.yaml").is_file() else None
            return Saved(path, recipe, read_folder(path), {})
        raise ValueError(
            f"{path} holds neither checkpoints/last.ckpt nor an export (model.safetensors and recipe.yaml). "
            "Train it first with `zipar-train fit`, or give another folder"
        )
    content = read_file(path)
    if "recipe" not in content or "state_dict" not in content:
        return Saved(path, None, tensors(content, entry=entry, where=path), {})
    state = {name.removeprefix("model."): t for name, t in tensors(content, entry="state_dict", where=path).items()}
    del content["state_dict"]
    return Saved(path, parse(content.pop("recipe"), where=f"{path}, its recipe"), state, content)


def _lora_name(name: str) -> str:
    """A tensor's name in PEFT's files as it is in an adapted model; other names stay."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".weight", ".default.weight") if lora.MARK in name and ".default." not in name else name


def restored(
    model: Model, saved: Saved, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> Family:
    """A family with saved weights, low-rank adapters merged.

    Args:
        dtype: that the weights are converted to one by one, never all at once; None: as they are in the file.

    Raises:
        ValueError: if the weights belong to another model; lists what differs.
    """
    if saved.recipe is not None:
        _same_model(saved, saved.recipe, model)
    if saved.adapter:
        return _with_adapters(model, saved, dtype=dtype, device=device)
    family = build(model, dtype=dtype or torch.float32, device="meta" if dtype is None else device, empty=True)
    wanted, heads = family.model.state_dict(), family.model.config.num_attention_heads
    state = saved.state
    if (renamed := family.renamed(state)) is not None:
        saved, state = saved._replace(state=renamed), renamed
    if published := layout.is_published(state):
        wanted = layout.to_published(wanted, heads=heads, codes=model.codes)
    _account(saved, wanted, published)
    if saved.recipe is not None and saved.recipe.model != model:
        theirs = build(saved.recipe.model, empty=True, device="meta").model.config.num_attention_heads
        if theirs != heads:  # which changes no tensor's shape
            raise ValueError(
                f"{saved.path} has {theirs} attention heads, the model of this recipe {heads}. Mend model.heads"
            )
    if published:
        state = layout.from_published(state, heads=heads)
    if dtype is None:
        family.model.load_state_dict(state, assign=True)
        family.model.to(device=device)  # type: ignore[call-arg]
    else:
        family.model.load_state_dict(state)
    return family


def _with_adapters(model: Model, saved: Saved, **kwargs: Any) -> Family:
    recipe = saved.recipe
    assert recipe is not None and recipe.tune.lora is not None
    family = restored(model, _base(model, saved, recipe), **kwargs)
    try:
        lora.wrapped(family.model, recipe.tune.lora, saved.state).merge_and_unload()  # in place
    except ValueError as error:
        raise ValueError(f"{saved.path}: {error}") from error
    return family


def _base(model: Model, saved: Saved, recipe: Recipe) -> Saved:
    """The weights that adapters were trained on: the first found whose fingerprint is the one they keep.

    They are looked for where the model that is asked for has its weights, then where the recipe of the adapters had
    them, a relative path from here and from the folders above the adapters.
    """
    places = [] if model.weights in (None, recipe.model.weights) else [(model.weights, model.weights_entry)]
    if recipe.model.weights is not None:
        entry, relative = recipe.model.weights_entry, Path(recipe.model.weights)
        places.append((recipe.model.weights, entry))
        if not relative.is_absolute() and not relative.exists():
            above = (folder / relative for folder in saved.path.absolute().parents)
            places += [(str(place), entry) for place in above if place.exists()]
    made_on, problems = saved.extra.get("base"), []
    for place, entry in places:
        try:
            base = read(place, entry=entry)  # type: ignore[arg-type]
        except ValueError as error:
            problems.append(str(error))
            continue
        if made_on is None or made_on == lora.fingerprint(base.state):
            return base
        problems.append(f"{place} holds other weights: their fingerprint is not {made_on}, that of the adapters' base")
    raise ValueError(
        f"{saved.path} holds adapters, and the weights that they were trained on are not found: "
        f"{'; '.join(problems) or 'its recipe names no model.weights'}. Say where they are: --set model.weights=PATH"
    )


def _same_model(saved: Saved, recipe: Recipe, model: Model) -> None:
    for key in ("family", "grid", "codes", "classes", "text", "words"):
        theirs, ours = getattr(recipe.model, key), getattr(model, key)
        alike = key == "text" and theirs and ours and theirs.features == ours.features
        alike = alike or (key == "words" and theirs and ours and theirs.vocabulary == ours.vocabulary)
        if theirs != ours and not alike:
            raise ValueError(
                f"{saved.path} is of another recipe ({recipe.name}): its model.{key} is {theirs}, here it "
                f"is {ours}. Give a checkpoint of this recipe, or the recipe of this checkpoint"
            )


def _account(saved: Saved, wanted: dict[str, Tensor], published: bool) -> None:
    """Every tensor is there, none besides, each in its shape, or an error that lists them."""
    if problems := unaccounted(saved.state, wanted):
        remedy = "Give a checkpoint of this recipe, or mend the recipe's depth, heads, width and feed_forward"
        if published:
            remedy = f"The file looks like {layout.looks_like(saved.state)}: use the recipe of that size, or its file"
        raise ValueError(f"{saved.path} does not fit the model of this recipe. {problems}. {remedy}")
