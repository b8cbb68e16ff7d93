"""Export of weights: a transformers folder, a `.pt` file for the original LlamaGen and ZipAR scripts, or adapters."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from zipar_train.export.model_card import evaluation, model_card
from zipar_train.io.files import make_folder, write_atomic
from zipar_train.models import lora
from zipar_train.models.files import find
from zipar_train.models.llamagen import state_dict
from zipar_train.models.restore import LoadedWeights, initial_weights, load_family, read
from zipar_train.recipe.load import dump
from zipar_train.recipe.schema import Recipe

Target = Literal["hf", "original", "llamagen", "adapter"]
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json")
SHARD = "10GB"  # most in a file


def export(checkpoint: str | Path | Recipe, out: str | Path, *, to: Target = "hf") -> Path:
    """Write weights in their own dtype, with a model card.

    Args:
        checkpoint: A run folder, a checkpoint or an export; or a recipe, for the weights that it starts from.
        out: A new folder; for "llamagen" a new `.pt` file, with its card as `.md` beside it.
        to: "hf": a folder for `from_pretrained(out, trust_remote_code=True)`, which needs only transformers, or for
            `zipar_train.load(out)`; adapters are merged. "original": a folder in the layout of deepseek-ai/Janus, for
            the family janus; adapters are merged. "llamagen": a file for the original LlamaGen and ZipAR
            scripts; adapters are merged. "adapter": a PEFT folder with only the adapters.

    Returns:
        The path `out`.

    Raises:
        ValueError: If there is nothing to export, or `out` already exists.
        OSError: If it cannot be written.
    """
    out = Path(out)
    if to == "llamagen" and out.suffix != ".pt":
        raise ValueError(f"--out {out}: --to llamagen writes one file, whose name must end in .pt")
    for file in (out, out.with_suffix(".md")) if to == "llamagen" else ():
        if file.exists():
            raise ValueError(f"{file} already exists: give another --out, or remove it")
    if to != "llamagen" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder: give another --out, or remove it")
    recipe, saved = _source(checkpoint)
    if to == "adapter" and not saved.adapter:
        raise ValueError(
            f"{saved.path} holds no adapters: it was trained without tune.lora. Use --to hf or --to llamagen"
        )
    if to == "original" and recipe.model.family != "janus":
        raise ValueError(f"--to original is for the family janus, not {recipe.model.family}. Use --to hf")
    card = model_card(recipe, saved, evaluation(saved), to).encode()
    if to == "llamagen":
        write_atomic(out.with_suffix(".md"), card)

        def save(aside: Path) -> None:
            with open(aside, "wb") as file:  # a Python file, whose errors name the reason
                torch.save({"model": published(recipe, saved)}, file)

        try:
            _whole(out, save)
        except BaseException:
            out.with_suffix(".md").unlink(missing_ok=True)
            raise
        return out

    def write(aside: Path) -> None:
        make_folder(aside)
        if to == "adapter":
            assert recipe.tune.lora is not None
            load_family(recipe.model, saved, dtype=None)  # check that the adapters load
            family = load_family(recipe.model, initial_weights(recipe.model), dtype=None)
            peft = lora.wrapped(family.model, recipe.tune.lora, saved.state, where=saved.path)
            peft.peft_config["default"].base_model_name_or_path = recipe.model.weights
            peft.save_pretrained(aside, save_embedding_layers=False)
            if made_on := saved.extra.get("base"):  # fingerprint of the base weights
                (aside / "base").write_text(made_on)
        else:
            family, source = load_family(recipe.model, saved, dtype=None), recipe.model.weights
            if to == "original":
                _save_original(family, source, aside)
            else:
                family.published(source).save_pretrained(aside)
            if recipe.model.token_prompt:
                _copy_companions(find(str(source)), aside)
        (aside / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        (aside / "README.md").write_bytes(card)
        if out.is_dir():
            out.rmdir()

    _whole(out, write)
    return out


def _save_original(family: Any, source: str | None, folder: Path) -> None:
    """Write a Janus in its authors' layout, in files of the kind that `source` consists of."""
    state, config = family.original(source)
    safe = any(find(str(source)).glob("*.safetensors"))
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it advises against .bin, which the authors' published files are
    try:
        save_torch_state_dict(state, folder, safe_serialization=safe, max_shard_size=SHARD)
    finally:
        hub_logging.set_verbosity(before)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_companions(source: Path, folder: Path) -> None:
    """Copy the files of a checkpoint's text tokenizer, and of its processor if `folder` has the same layout."""
    layouts = [json.loads((place / "config.json").read_bytes()).get("model_type") for place in (source, folder)]
    for file in source.glob("*"):
        foreign = layouts[0] != layouts[1] and file.name in PROCESSORS
        known = file.suffix in (".json", ".model", ".txt", ".jinja") and "index" not in file.name
        if known and not foreign and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)


def published(recipe: Recipe, saved: LoadedWeights) -> dict[str, torch.Tensor]:
    """Return saved weights under LlamaGen's names, in their own dtype."""
    model = load_family(recipe.model, saved, dtype=None).model
    return state_dict.to_published(
        model.state_dict(), heads=model.config.num_attention_heads, codes=recipe.model.codebook_size
    )


def _source(checkpoint: str | Path | Recipe) -> tuple[Recipe, LoadedWeights]:
    if isinstance(checkpoint, Recipe):
        if checkpoint.model.weights is None:
            raise ValueError(
                f"recipe {checkpoint.name} starts from random weights: there is nothing to export. "
                "Set model.weights, or give --checkpoint"
            )
        saved = read(checkpoint.model.weights, entry=checkpoint.model.weights_entry, checksum=True)
        return saved.recipe or checkpoint, saved
    saved = read(checkpoint, checksum=True)
    if saved.recipe is None:
        raise ValueError(
            f"{saved.path} carries no recipe. Name the recipe it is for: "
            f"--recipe llamagen-l --set model.weights={saved.path}"
        )
    return saved.recipe, saved


def _whole(out: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` create a file or folder under a temporary name, and rename it to `out`.

    Raises:
        OSError: If it cannot be written; names it, and nothing is left behind.
    """
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    transformers_logging.disable_progress_bar()
    try:
        make_folder(out.parent)
        write(aside)
        os.replace(aside, out)
    except (OSError, RuntimeError, SafetensorError) as error:  # raised by torch and safetensors on a full disk
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"cannot write {out}: {getattr(reason, 'strerror', None) or reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        transformers_logging.enable_progress_bar()
