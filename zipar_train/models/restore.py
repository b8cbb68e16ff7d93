"""Loading of weights into a family from run folders, checkpoints, exports and published files, fully checked."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipar_train.models import lora
from zipar_train.models.family import Family, build
from zipar_train.models.files import Checksums, find, peeled, read_file, read_folder, tensors
from zipar_train.models.filling import check_numbers, unaccounted
from zipar_train.models.llamagen import state_dict
from zipar_train.recipe.load import parse_stored
from zipar_train.recipe.model import Model
from zipar_train.recipe.schema import Recipe
from zipar_train.run.checkpoints import CheckpointEntries, last_checkpoint


class LoadedWeights(NamedTuple):
    path: Path
    recipe: Recipe | None  # the recipe of the run; None: published by others
    state: dict[str, Tensor]  # by the names of the family's model or of LlamaGen; mapped from the file
    extra: dict[str, Any]  # other content of the file
    sha256: str | None = None  # checksum of the bytes that were read, if requested

    @property
    def adapter(self) -> bool:
        """Return True if these are only low-rank adapters, which need the weights that their recipe started from."""
        return self.recipe is not None and self.recipe.tune.lora is not None and all(lora.MARK in n for n in self.state)


def read(source: str | Path, *, entry: str | None = None, checksum: bool = False) -> LoadedWeights:
    """Read weights from a run folder, its `.ckpt`, an exported folder or a published file, on disk or on the hub.

    No code in the file is executed: `weights_only=True`, or safetensors.

    Args:
        source: A path, `owner/repo:file`, or `owner/repo:` for a checkpoint in transformers' layout.
        entry: Entry of a published `.pt`, see `model.weights_entry` in the recipe.
        checksum: Compute the SHA-256 of exactly the bytes that are read, even if the file is replaced meanwhile. For
            several files, it is the SHA-256 of their checksums in the order of their names.

    Raises:
        ValueError: If the weights cannot be read; names the file, the problem and the remedy.
    """
    checksums: Checksums | None = {} if checksum else None
    saved = _read(find(source), entry, checksums)
    if not checksums:
        return saved
    each = [checksums[path] for path in sorted(checksums)]
    return saved._replace(sha256=each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest())


def _read(path: Path, entry: str | None, checksums: Checksums | None) -> LoadedWeights:
    if path.is_dir():
        if (checkpoint := last_checkpoint(path)) is not None:
            return _read(checkpoint, None, checksums)
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (path / name).is_file() and (path / "recipe.yaml").is_file():
                state = tensors(read_file(path / name, checksums=checksums), where=path / name)
                state = {_lora_name(key): tensor for key, tensor in state.items()}
                extra = {"base": _base_of(path / "base")} if os.path.lexists(path / "base") else {}
                return LoadedWeights(path, _recipe_of(path), state, extra)
        if (path / "config.json").is_file():  # transformers' layout: published, or an export of several files
            recipe = _recipe_of(path) if (path / "recipe.yaml").is_file() else None
            return LoadedWeights(path, recipe, read_folder(path, checksums=checksums), {})
        raise ValueError(
            f"{path} holds neither checkpoints/last.ckpt nor an export (model.safetensors and recipe.yaml). "
            "Train it first with `zipar-train fit`, or give another folder"
        )
    content = read_file(path, checksums=checksums)
    if "recipe" not in content or "state_dict" not in content:
        return LoadedWeights(path, None, tensors(content, entry=entry, where=path), {})
    state = {name.removeprefix("model."): t for name, t in tensors(content, entry="state_dict", where=path).items()}
    del content["state_dict"]
    recipe = parse_stored(content.pop("recipe"), where=f"{path}, its recipe")
    CheckpointEntries.check(content, where=path)
    return LoadedWeights(path, recipe, state, content)


def _recipe_of(folder: Path) -> Recipe:
    """Return the recipe of an export."""
    return parse_stored(folder / "recipe.yaml", where=str(folder / "recipe.yaml"))


def _base_of(path: Path) -> str:
    """Return the fingerprint of the base weights that is stored in an export of adapters."""
    try:
        if not path.is_file():
            raise ValueError
        with path.open("rb") as file:
            text = file.read(lora.FINGERPRINT + 2).decode("ascii").strip()
        if not re.fullmatch(rf"[0-9a-f]{{16,{lora.FINGERPRINT}}}", text):
            raise ValueError
    except (ValueError, OSError):
        raise ValueError(f"{path} holds no fingerprint of weights. Export the adapters again") from None
    return text


def _lora_name(name: str) -> str:
    """Convert a tensor name of PEFT's files to that of a model with adapters; other names are unchanged."""
    name = name.removeprefix("base_model.model.")
    if lora.MARK not in name or ".default" in name:
        return name
    return name.replace(".weight", ".default.weight") if name.endswith(".weight") else f"{name}.default"  # embeddings


def load_family(
    model: Model,
    saved: LoadedWeights,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    chain: Sequence[Path] = (),
) -> Family:
    """Build a family with saved weights; low-rank adapters are merged.

    Args:
        dtype: The dtype to convert weights to, one tensor at a time; None: the dtype of the file.
        chain: Paths of the adapters whose base weights are being loaded.

    Raises:
        ValueError: If the weights belong to another model, or are not finite; lists the problems.
    """
    if saved.recipe is not None:
        _same_model(saved, saved.recipe, model)
    if saved.adapter:
        return _with_adapters(model, saved, dtype=dtype, device=device, chain=chain)
    family = build(model, dtype=dtype or torch.float32, device="meta" if dtype is None else device, empty=True)
    heads = family.model.config.num_attention_heads
    try:
        state, wanted = _named(family, saved.state, codes=model.codebook_size)
    except ValueError as error:
        raise ValueError(f"{saved.path} {error}") from None
    _account(saved, state, wanted)
    check_numbers(state, wanted, where=saved.path)
    if saved.recipe is not None and saved.recipe.model != model:
        theirs = build(saved.recipe.model, empty=True, device="meta").model.config.num_attention_heads
        if theirs != heads:  # no tensor's shape depends on it
            raise ValueError(
                f"{saved.path} has {theirs} attention heads, the model of this recipe {heads}. Fix model.num_heads"
            )
    if state_dict.is_published(state):
        state = state_dict.from_published(state, heads=heads)
    if dtype is None:
        family.model.load_state_dict(dict(state), assign=True)  # without metadata: torch notes `assign` there, for good
        family.model.to(device=device)  # type: ignore[call-arg]
    else:
        family.model.load_state_dict(state)
    return family


def _named(family: Family, saved: dict[str, Tensor], *, codes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return tensors by the names of the model or of LlamaGen, and the wanted ones, for the best-matching prefix."""
    ours, found = family.model.state_dict(), []
    for state in peeled(saved):
        if (renamed := family.renamed(state)) is not None:
            state = renamed
        wanted = ours
        if state_dict.is_published(state):
            wanted = state_dict.to_published(ours, heads=family.model.config.num_attention_heads, codes=codes)
        found.append((state, wanted))
    return min(found, key=lambda pair: len(pair[0].keys() ^ pair[1].keys()))


def initial_weights(model: Model) -> LoadedWeights:
    """Read the weights that a recipe starts from, `model.weights`.

    They may come from a run at another grid, because no tensor depends on the grid.

    Raises:
        ValueError: As in `read`.
    """
    assert model.weights is not None
    return at_grid(read(model.weights, entry=model.weights_entry), model)


def at_grid(saved: LoadedWeights, model: Model) -> LoadedWeights:
    """Return weights with the grid in their recipe replaced by that of a model."""
    if saved.recipe is None:
        return saved
    theirs = saved.recipe.model.model_copy(update={"grid": model.grid})
    return saved._replace(recipe=saved.recipe.model_copy(update={"model": theirs}))


def _with_adapters(model: Model, saved: LoadedWeights, *, chain: Sequence[Path], **kwargs: Any) -> Family:
    recipe = saved.recipe
    assert recipe is not None and recipe.tune.lora is not None
    base = _base(model, saved, recipe, chain := [*chain, saved.path.resolve()])
    family = load_family(model, base, chain=chain, **kwargs)
    lora.wrapped(family.model, recipe.tune.lora, saved.state, where=saved.path).merge_and_unload()  # in place
    return family


def _base(model: Model, saved: LoadedWeights, recipe: Recipe, chain: Sequence[Path]) -> LoadedWeights:
    """Return the weights that adapters were trained on: the first found with the fingerprint stored in the adapters.

    The search starts at the `weights` of `model`, then uses those of the adapters' recipe. A relative path is tried
    from the working directory and from the folders above the adapters.
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
            base = at_grid(read(place, entry=entry), model)  # type: ignore[arg-type]
        except ValueError as error:
            problems.append(str(error))
            continue
        if base.path.resolve() in chain:
            problems.append(f"{place} holds the adapters themselves")
            continue
        if made_on is None or made_on == lora.fingerprint(base.state):
            return base
        problems.append(f"{place} holds other weights: their fingerprint is not {made_on}, that of the adapters' base")
    raise ValueError(
        f"{saved.path} holds adapters, and the weights that they were trained on are not found: "
        f"{'; '.join(problems) or 'its recipe names no model.weights'}. Say where they are: --set model.weights=PATH"
    )


def _same_model(saved: LoadedWeights, recipe: Recipe, model: Model) -> None:
    for key in ("family", "grid", "codebook_size", "num_classes", "t5_features", "token_prompt"):
        theirs, ours = getattr(recipe.model, key), getattr(model, key)
        alike = key == "t5_features" and theirs and ours and theirs.features == ours.features
        alike = alike or (key == "token_prompt" and theirs and ours and theirs.vocabulary == ours.vocabulary)
        alike = alike or (key == "grid" and ours in recipe.model.other_grids)
        if theirs != ours and not alike:
            why = " (the label embedding has a row for each class)" if key == "num_classes" else ""
            raise ValueError(
                f"{saved.path} is of another recipe ({recipe.name}): its model.{key} is {theirs}, here it "
                f"is {ours}{why}. Give a checkpoint of this recipe, or the recipe of this checkpoint"
            )


def _account(saved: LoadedWeights, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Check that exactly the wanted tensors are present, with the right shapes and kinds.

    Raises:
        ValueError: If not; lists the tensors and names the remedy.
    """
    if problems := unaccounted(state, wanted):
        remedy = "Give a checkpoint of this recipe, or fix its num_layers, num_heads, hidden_size and ffn_size"
        if state_dict.is_published(state):
            remedy = f"The file looks like {state_dict.looks_like(state)}: use the recipe of that size, or its file"
        raise ValueError(f"{saved.path} does not fit the model of this recipe. {problems}. {remedy}")
